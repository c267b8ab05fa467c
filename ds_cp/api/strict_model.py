"""Models of request bodies that name every field they do not take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from ds_cp.api.errors import FieldError, shown
from ds_cp.text import MAX_NAME_CHARS, closest

# Fields that do not change the answer.
IGNORED = frozenset(
    "user store metadata service_tier safety_identifier prompt_cache_key verbosity".split()
)


@dataclass(frozen=True)
class Unsupported:
    """A field of OpenAI's that is refused unless its value changes nothing.

    ``neutral``: such values, besides null. ``hint``: why the others are refused.
    """

    neutral: tuple[Any, ...]
    hint: str

    def accepts(self, value: object) -> bool:
        """Whether the value changes nothing."""
        return value is None or any(
            value == plain and isinstance(value, bool) == isinstance(plain, bool)
            for plain in self.neutral
        )


_NO_TOOLS = Unsupported(([],), "tool calls are not supported yet")
_NO_MEDIA = Unsupported((), "this server reads and writes text only")
_NO_TEMPLATE = Unsupported((), "templates come with the model; a request cannot bring or steer one")
_NO_GRAMMAR = Unsupported((), "constrained output is not supported yet")
# Fields of both kinds of completion, of one kind, and of a chat's message.
BOTH: dict[str, Unsupported] = {
    "response_format": Unsupported(({"type": "text"},), "only plain text is supported so far"),
    "use_beam_search": Unsupported((False,), "beam search is not supported"),
    "guided_json": _NO_GRAMMAR,
    "guided_regex": _NO_GRAMMAR,
    "guided_choice": _NO_GRAMMAR,
    "structured_outputs": _NO_GRAMMAR,
}
COMPLETION_ONLY: dict[str, Unsupported] = {
    "suffix": Unsupported(("",), "inserting before a suffix is not supported"),
}
CHAT_ONLY: dict[str, Unsupported] = {
    "tools": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "tool_choice": Unsupported(("none", "auto"), "tool calls are not supported yet"),
    "function_call": Unsupported(("none", "auto"), "tool calls are not supported yet"),
    "parallel_tool_calls": Unsupported((True, False), "tool calls are not supported yet"),
    "modalities": Unsupported((["text"],), "this server reads and writes text only"),
    "audio": _NO_MEDIA,
    "prediction": Unsupported((), "predicted outputs are not supported"),
    "web_search_options": Unsupported((), "this server makes no outbound connection"),
    "reasoning_effort": Unsupported((), "models are run as they are; there is no effort to set"),
    "chat_template": _NO_TEMPLATE,
    "chat_template_kwargs": _NO_TEMPLATE,
}
MESSAGE: dict[str, Unsupported] = {
    "name": Unsupported((), "names of participants are not supported; put the name in the content"),
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "refusal": Unsupported((), "refusals cannot be sent back"),
    "annotations": Unsupported(([],), "annotations cannot be sent back"),
    "audio": _NO_MEDIA,
}


class StrictModel(BaseModel):
    """Unknown fields are errors with the nearest valid name; no value is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[dict[str, Unsupported]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.unsupported:
                if not cls.unsupported[name].accepts(value):
                    raise FieldError(f"{name} is not supported: {cls.unsupported[name].hint}", name)
            elif name not in cls.ignored:
                raise FieldError(unknown_field(name, list(cls.model_fields)), name[:MAX_NAME_CHARS])
        return kept


def unknown_field(name: str, valid: list[str]) -> str:
    """A sentence that names an unknown field and the closest valid one."""
    near = closest(name, valid)
    hint = f"did you mean {near}?" if near else f"valid fields: {', '.join(sorted(valid))}"
    return f"unknown field {shown(name)}; {hint}"
