"""The bodies of POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from ds_cp.api.chat.request import Effort, Part, Turn
from ds_cp.api.errors import FieldError, shown
from ds_cp.api.messages.blocks import read_messages, read_system, with_system
from ds_cp.api.messages.edits import read_edits, without_thinking
from ds_cp.api.messages.fields import BODY, HARMLESS
from ds_cp.api.requests.client_tools import (
    check_depth,
    in_place,
    read_client_tools,
)
from ds_cp.api.requests.constraints import constraint_as
from ds_cp.api.requests.foreign_fields import Unsupported
from ds_cp.api.requests.messages import plain_text
from ds_cp.api.requests.sampling import CommonRequest
from ds_cp.api.requests.strict_model import StrictModel, notes_of, sift
from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.parsing.definitions import Tool, ToolChoice, read_choice
from ds_cp.sampling_params import MAX_STOPS

_FORMAT = ("type", "schema")
_TOOL = ("type", "name", "description", "input_schema", "strict", "input_examples")
_MODES = {"auto": "auto", "any": "required", "none": "none"}
MAX_EXAMPLES = 32  # examples of a tool's input


class ThinkingConfig(StrictModel):
    """Whether the model thinks before it answers, where its template can be told. ``display``
    "omitted": what it thinks is not sent."""

    harmless: ClassVar[frozenset[str]] = HARMLESS["thinking_config"]

    type: Literal["enabled", "disabled", "adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(StrictModel):
    """``effort``: how long the model thinks. ``format``: JSON that follows a schema."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = Field(None, max_length=16)

    @field_validator("format")
    @classmethod
    def _format(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if not value:
            return None
        check_depth(value, "output_config.format", "")
        return sift("output_config.format", value, _FORMAT, {}, frozenset(), notes_of(info))


class AnthropicChoice(StrictModel):
    """``any``: one of the tools at least; ``tool``: the one that is named."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, max_length=256)
    disable_parallel_tool_use: bool | None = None


class CountRequest(CommonRequest):
    """POST /v1/messages/count_tokens, and what /v1/messages reads of a conversation."""

    harmless: ClassVar[frozenset[str]] = HARMLESS["body"]
    unsupported: ClassVar[dict[str, Unsupported]] = BODY

    messages: list[Turn] = Field(description="messages of blocks: text, tool use, thinking")
    system: list[Part] | None = Field(None, description="text, or a list of text blocks")
    tools: list[Tool] | None = Field(None, description="the client's; hosted ones are skipped")
    tool_choice: AnthropicChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    context_management: int | None = Field(
        None, description="edits of type clear_thinking_20251015: turns whose thinking stays"
    )

    _constraint: StructuredOutputsParams | None = PrivateAttr(None)
    _choice: ToolChoice = PrivateAttr(ToolChoice("none"))

    @field_validator("messages", mode="plain", json_schema_input_type=list[dict[str, Any]])
    @classmethod
    def _messages(cls, value: Any, info: ValidationInfo) -> list[Turn]:
        return read_messages(value, notes_of(info))

    @field_validator(
        "system", mode="plain", json_schema_input_type=str | list[dict[str, Any]] | None
    )
    @classmethod
    def _system(cls, value: Any, info: ValidationInfo) -> list[Part] | None:
        return None if value is None else read_system(value, notes_of(info))

    @field_validator("tools", mode="plain", json_schema_input_type=list[dict[str, Any]] | None)
    @classmethod
    def _tools(cls, value: Any, info: ValidationInfo) -> list[Tool] | None:
        notes = notes_of(info)

        def as_function(tool: Mapping[str, Any]) -> Mapping[str, Any] | None:
            if tool.get("type") not in (None, "custom"):
                return None
            kept = sift("tool", tool, _TOOL, {}, HARMLESS["tool"], notes)
            schema = kept.pop("input_schema", None)
            described = _with_examples(kept.get("description"), kept.pop("input_examples", None))
            return kept | {"parameters": schema, "description": described}

        if value is None:
            return None
        return read_client_tools(value, as_function, notes, "input_schema")

    @field_validator(
        "context_management", mode="plain", json_schema_input_type=dict[str, Any] | None
    )
    @classmethod
    def _edits(cls, value: Any, info: ValidationInfo) -> int | None:
        return read_edits(value, notes_of(info))

    @model_validator(mode="after")
    def _read_choice(self) -> CountRequest:
        choice = self.tool_choice
        if choice is None:
            self._choice = read_choice(None, self.tools or [])
            return self
        if choice.type in ("any", "tool") and not self.tools:
            raise FieldError(
                f"tool_choice is {choice.type} but the request has no tools", "tool_choice"
            )
        wish: Any = _MODES.get(choice.type, {"type": "function", "name": choice.name})
        try:
            self._choice = read_choice(wish, self.tools or [], not choice.disable_parallel_tool_use)
        except RequestError as err:
            found = in_place(err, "", {".function": ""})
            raise FieldError(str(found), found.param) from None
        return self

    @model_validator(mode="after")
    def _read_format(self) -> CountRequest:
        wish = self.output_config.format if self.output_config else None
        self._constraint = _constraint(wish)
        return self

    @property
    def turns(self) -> list[Turn]:
        """The whole conversation, as it is edited."""
        return with_system(
            self.system or [], without_thinking(self.messages, self.context_management)
        )

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """What ``output_config.format`` asks for; None for free text."""
        return self._constraint

    @property
    def choice(self) -> ToolChoice:
        """Which tools may be called."""
        return self._choice

    @property
    def effort(self) -> Effort | None:
        """How long the model is asked to think; None where nothing says so."""
        wish = self.thinking.type if self.thinking else None
        if wish == "disabled":
            return "none"
        given = self.output_config.effort if self.output_config else None
        return given or ("medium" if wish == "enabled" else None)


class MessagesRequest(CountRequest):
    """POST /v1/messages. ``max_tokens`` is lowered to what fits."""

    max_tokens: int = Field(description="new tokens at most")
    stop_sequences: list[str] | None = Field(None, max_length=MAX_STOPS, fail_fast=True)

    @field_validator("stop_sequences")
    @classmethod
    def _stops(cls, value: list[str] | None) -> list[str] | None:
        for text in value or []:
            plain_text(text, "stop_sequences")
        return value

    @property
    def hides_thinking(self) -> bool:
        """Whether what the model thinks is not sent."""
        return self.thinking is not None and self.thinking.display == "omitted"


def _with_examples(description: Any, examples: Any) -> Any:
    """A tool's description with the examples of its input, for which no template has a place."""
    if examples is None or examples == []:
        return description
    if not isinstance(examples, list) or len(examples) > MAX_EXAMPLES:
        raise FieldError(
            f"input_examples must be a list of at most {MAX_EXAMPLES} inputs", "input_examples"
        )
    if not isinstance(description, str | None):
        return description  # refused with the tool's other fields
    check_depth(examples, "input_examples", "input_examples")
    lines = [json.dumps(example, ensure_ascii=False) for example in examples]
    return "\n".join([description or "", "Examples of its input:", *lines]).lstrip("\n")


def _constraint(wish: dict[str, Any] | None) -> StructuredOutputsParams | None:
    """The constraint that ``output_config.format`` spells. Raises ``FieldError``."""
    if wish is None:
        return None
    where = "output_config.format"
    if wish.get("type") != "json_schema" or not isinstance(wish.get("schema"), dict):
        raise FieldError(
            f"{where} must have the type json_schema, not {shown(wish.get('type'))}, "
            "and a JSON schema: an object",
            where,
        )
    named = {"schema": wish["schema"], "strict": True}
    return constraint_as(where, {"type": "json_schema", "json_schema": named})
