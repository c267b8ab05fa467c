"""Tool calls and their results in the messages of a conversation: checked, and as chat templates
want them. Errors are ``RequestError`` and name the field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ds_cp.errors import RequestError
from ds_cp.parsing.calls import MAX_CALLS, is_name
from ds_cp.parsing.definitions import count_values
from ds_cp.parsing.ids import OPENAI, id_for_template
from ds_cp.parsing.json_reader import is_json
from ds_cp.text import show

MAX_ID = 512  # characters of a call's id
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair
MAX_BITS = 63  # of an integer that a template is given
RAW = "raw_arguments"  # the key of arguments that are no JSON object, in their place


@dataclass(frozen=True)
class EarlierCall:
    """A call that an assistant's message holds. ``arguments``: JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str

    def for_template(self, ids: str = OPENAI, text_arguments: bool = False) -> dict[str, Any]:
        """The call as chat templates expect it: arguments as an object, or as text where the
        template joins texts. What the model wrote may be no JSON; then the object is
        ``{RAW: text}``, so that the conversation can go on. An integer of more than 64 bits is the
        text of its digits, since templates are rendered in a process that takes no longer ones."""
        arguments: Any = self.arguments or "{}"
        if not text_arguments:
            arguments = as_object(arguments, _short_integer)
        function = {"name": self.name, "arguments": arguments}
        return {"type": "function", "id": id_for_template(ids, self.id), "function": function}


def as_object(text: str, integer: Callable[[str], Any] = int) -> dict[str, Any]:
    """The arguments of a call as an object that can be written as JSON again; ``{RAW: text}`` for
    what is none: no JSON object, a number beyond the floats, or half a surrogate pair. ``integer``:
    the value of an integer's digits."""
    if not is_json(text.strip(), "{"):
        return {RAW: text}
    try:
        found: dict[str, Any] = json.loads(text, parse_int=integer, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {RAW: text}
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is no number of 64 bits")
    return number


def _short_integer(digits: str) -> int | str:
    number = int(digits)
    return number if number.bit_length() <= MAX_BITS else digits


def read_calls(value: Any, where: str) -> list[EarlierCall]:
    """``tool_calls`` of an assistant's message; [] for null. ``where``: its field, such as
    ``messages[3].tool_calls``. Raises ``RequestError``."""
    if value is None:
        return []
    if not isinstance(value, list):
        _refuse(f"{where} must be a list of calls", where)
    if len(value) > MAX_CALLS:
        _refuse(f"{where} has {len(value)} calls; at most {MAX_CALLS}", where)
    calls = [_read_call(item, f"{where}[{i}]") for i, item in enumerate(value)]
    ids = [call.id for call in calls]
    if len(set(ids)) < len(ids):
        _refuse(f"{where}: an id is given twice", where)
    return calls


def _read_call(value: Any, where: str) -> EarlierCall:
    if not isinstance(value, dict):
        _refuse(f"{where} must be an object", where)
    if value.get("type", "function") != "function":
        _refuse(f'{where}.type must be "function", not {show(value["type"])}', f"{where}.type")
    function = value.get("function")
    if not isinstance(function, dict):
        _refuse(f"{where}.function must be an object with name and arguments", f"{where}.function")
    name = function.get("name")
    if not isinstance(name, str) or not is_name(name):
        _refuse(f"{where}.function.name must be a tool's name", f"{where}.function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):  # some clients send the object itself
        count_values(arguments, f"{where}.function.arguments")
        arguments = json.dumps(arguments, ensure_ascii=False)
    if arguments is not None and not isinstance(arguments, str):
        _refuse(f"{where}.function.arguments must be JSON text", f"{where}.function.arguments")
    return EarlierCall(read_id(value.get("id"), f"{where}.id"), name, arguments or "")


def read_id(value: Any, where: str) -> str:
    """An id of a call. Raises ``RequestError``."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID or _HALF.search(value):
        _refuse(f"{where} must be the id of a call, 1 to {MAX_ID} characters", where)
    try:
        value.encode()
    except UnicodeEncodeError as err:
        _refuse(f"{where} is not text: half a surrogate pair at character {err.start}", where)
    return value


def _refuse(message: str, param: str) -> NoReturn:
    raise RequestError(message, param)
