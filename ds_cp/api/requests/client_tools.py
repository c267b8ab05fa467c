"""Tools in the spellings of /v1/responses and /v1/messages, read as those of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ds_cp.api.errors import FieldError
from ds_cp.api.requests.chat_body import check_values
from ds_cp.api.requests.strict_model import Notes
from ds_cp.errors import RequestError
from ds_cp.parsing.definitions import (
    MAX_SCHEMA_NODES,
    MAX_TOOLS,
    Tool,
    count_values,
    read_tools,
)

# From a tool of the client: the function in the spelling of a chat, or None for a hosted tool.
AsFunction = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


def read_client_tools(
    value: Any, as_function: AsFunction, notes: Notes, schema_name: str = "parameters"
) -> list[Tool]:
    """The functions among the tools of a body. Hosted ones, which this server does not have, are
    skipped and told in ``notes``. ``schema_name``: what the protocol calls a function's schema.
    Raises ``FieldError``, its field below the body's ``tools``."""
    if not isinstance(value, list):
        raise FieldError("tools must be a list of tools")
    if len(value) > MAX_TOOLS:  # before one is looked at
        raise FieldError(f"tools has {len(value)} tools; at most {MAX_TOOLS}")
    chat = []
    for tool in value:
        function = as_function(tool) if isinstance(tool, dict) else None
        if function is not None:
            chat.append({"type": "function", "function": function})
        elif isinstance(tool, dict) and isinstance(tool.get("type"), str):
            notes.skip(f"tools.{tool['type']}")
            chat.append({"type": "hosted"})
        else:
            chat.append(tool)
    try:
        tools = read_tools(chat, skip_unknown=True)
        for tool in tools:
            check_values([tool.description, tool.parameters], "tools")
        return tools
    except FieldError as err:
        raise FieldError(str(err)) from None  # it names this field
    except RequestError as err:
        raise in_place(err, "tools", {".function": "", ".parameters": f".{schema_name}"}) from None


def in_place(err: RequestError, field: str, renamed: Mapping[str, str] = {}) -> FieldError:
    """An error of ``ds_cp.parsing`` as one of the body's ``field``, by the client's names."""
    message, param = str(err), err.param or ""
    for ours, theirs in renamed.items():
        message, param = message.replace(ours, theirs), param.replace(ours, theirs)
    return FieldError(message, param.removeprefix(field).removeprefix(".") or None)


def check_depth(value: Any, name: str, param: str) -> None:
    """``FieldError`` for a value that is nested too deep, or has too many values in it."""
    try:
        count = count_values(value, name)
    except RequestError as err:
        raise FieldError(str(err), param or None) from None
    if count > MAX_SCHEMA_NODES:
        raise FieldError(f"{name} has more than {MAX_SCHEMA_NODES} values", param or None)
