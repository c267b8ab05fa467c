"""The tools of a request, and which of them may or must be called. Errors are ``RequestError`` and
name the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from ds_cp.errors import RequestError
from ds_cp.text import show

MAX_TOOLS = 128  # tools of one request
MAX_TOOL_NAME = 64  # characters
MAX_DESCRIPTION = 1 << 16  # characters of a tool's description
MAX_SCHEMA_DEPTH = 64  # objects and lists within each other
MAX_SCHEMA_NODES = 20_000  # values in the schemas of one request
_NAME = re.compile(rf"[a-zA-Z0-9_.-]{{1,{MAX_TOOL_NAME}}}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that the client can run. ``parameters``: the JSON schema of its arguments, an
    object's. ``strict``: arguments must follow it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(_NO_ARGUMENTS))
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        described = {"description": self.description} if self.description else {}
        function = {"name": self.name, **described, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolChoice:
    """``mode``: "none", "auto", or "required": the answer is one or more calls. ``names``: the
    tools that may be called, in their order. ``single``: exactly one call."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] = ()
    single: bool = False


def read_tools(value: Any, where: str = "tools", skip_unknown: bool = False) -> list[Tool]:
    """The tools of a request; [] for null. ``skip_unknown``: those of another type than "function"
    are left out, and not refused. Raises ``RequestError``."""
    if value is None:
        return []
    if not isinstance(value, list):
        _refuse(f"{where} must be a list of tools", where)
    if len(value) > MAX_TOOLS:
        _refuse(f"{where} has {len(value)} tools; at most {MAX_TOOLS}", where)
    tools: dict[str, Tool] = {}
    nodes = 0
    for i, item in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(item, dict):
            _refuse(f"{place} must be an object", place)
        kind = item.get("type")
        if kind != "function":
            if skip_unknown and isinstance(kind, str):
                continue
            _refuse(f'{place}.type must be "function", not {show(kind)}', f"{place}.type")
        tool = read_function(item.get("function"), f"{place}.function")
        nodes += count_values(tool.parameters, f"{place}.function.parameters")
        if nodes > MAX_SCHEMA_NODES:
            _refuse(f"{where}: the schemas have more than {MAX_SCHEMA_NODES} values", where)
        if tool.name in tools:
            _refuse(f"{place}.function.name: {show(tool.name)} is given twice", place)
        tools[tool.name] = tool
    return list(tools.values())


def read_function(function: Any, place: str, schema_name: str = "parameters") -> Tool:
    """A tool from its ``name``, ``description``, schema and ``strict``. ``place``: its field;
    ``schema_name``: what the protocol calls the schema. Raises ``RequestError``."""
    if not isinstance(function, dict):
        _refuse(f"{place} must be an object with a name", place)
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get(schema_name), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(
            f"{place}.name must be 1 to {MAX_TOOL_NAME} letters, digits, _, - or ., "
            f"not {show(name)}",
            f"{place}.name",
        )
    if description is not None and not isinstance(description, str):
        _refuse(f"{place}.description must be text", f"{place}.description")
    if description and len(description) > MAX_DESCRIPTION:
        _refuse(
            f"{place}.description has {len(description)} characters; at most {MAX_DESCRIPTION}",
            f"{place}.description",
        )
    if parameters is not None and not isinstance(parameters, dict):
        _refuse(f"{place}.{schema_name} must be a JSON schema, an object", f"{place}.{schema_name}")
    if parameters and parameters.get("type", "object") != "object":
        _refuse(
            f'{place}.{schema_name}.type must be "object", not {show(parameters["type"])}',
            f"{place}.{schema_name}.type",
        )
    if strict is not None and not isinstance(strict, bool):
        _refuse(f"{place}.strict must be true or false", f"{place}.strict")
    return Tool(name, description or "", parameters or dict(_NO_ARGUMENTS), bool(strict))


def count_values(schema: Any, place: str) -> int:
    """The values in a schema, some number above ``MAX_SCHEMA_NODES`` for more than that. Raises
    ``RequestError`` for one that is nested more than ``MAX_SCHEMA_DEPTH`` deep."""
    seen, level, depth = 0, [schema], 0
    while level:
        seen += len(level)
        if seen > MAX_SCHEMA_NODES:  # before they are looked at
            return seen
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            _refuse(f"{place} is nested more than {MAX_SCHEMA_DEPTH} deep", place)
        following: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                following += node.values()
            elif isinstance(node, list):
                following += node
        level = following
    return seen


def read_choice(
    value: Any,
    tools: Sequence[Tool],
    parallel: bool | None = None,
    where: str = "tool_choice",
) -> ToolChoice:
    """Which tools may be called: OpenAI's ``tool_choice``, with ``parallel_tool_calls``. Null is
    "auto", or "none" without tools. The name of a function may stand beside its type, as in
    /v1/responses. Raises ``RequestError``."""
    names = tuple(tool.name for tool in tools)
    single = parallel is False
    if value is None:
        value = "auto" if tools else "none"
    if value == "none" or (value == "auto" and not tools):
        return ToolChoice("none")
    if isinstance(value, str):
        if value not in ("auto", "required"):
            _refuse(
                f'{where} must be "none", "auto", "required" or one function, not {show(value)}',
                where,
            )
        if not tools:
            _refuse(f"{where} is {show(value)} but the request has no tools", where)
        return ToolChoice("auto" if value == "auto" else "required", names, single)
    if isinstance(value, dict) and value.get("type") == "function":
        name = _chosen(value, names, where)
        return ToolChoice("required", (name,), True)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _allowed(value.get("allowed_tools"), names, single, f"{where}.allowed_tools")
    _refuse(f"{where} must be a mode or an object that names a function", where)


def _allowed(value: Any, names: tuple[str, ...], single: bool, where: str) -> ToolChoice:
    mode = value.get("mode") if isinstance(value, dict) else None
    chosen = value.get("tools") if isinstance(value, dict) else None
    if mode not in ("auto", "required") or not isinstance(chosen, list) or not chosen:
        _refuse(f'{where} must have a mode, "auto" or "required", and tools', where)
    if len(chosen) > MAX_TOOLS:
        _refuse(f"{where}.tools has {len(chosen)} tools; at most {MAX_TOOLS}", where)
    found = {_chosen(item, names, f"{where}.tools[{i}]") for i, item in enumerate(chosen)}
    kept = tuple(name for name in names if name in found)
    return ToolChoice("auto" if mode == "auto" else "required", kept, single)


def _chosen(value: Any, names: Sequence[str], where: str) -> str:
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        _refuse(f"{where}.function.name must be the name of a tool", f"{where}.function.name")
    if name not in names:
        have = ", ".join(names[:8]) or "none"
        _refuse(
            f"{where}.function.name: the request has no tool {show(name)}; it has {have}",
            f"{where}.function.name",
        )
    return name


def _refuse(message: str, param: str) -> NoReturn:
    raise RequestError(message, param)
