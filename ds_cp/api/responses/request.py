"""The body of POST /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from ds_cp.api.chat.request import Effort
from ds_cp.api.errors import FieldError, shown
from ds_cp.api.requests.chat_body import check_values
from ds_cp.api.requests.client_tools import (
    check_depth,
    in_place,
    read_client_tools,
)
from ds_cp.api.requests.constraints import constraint_as
from ds_cp.api.requests.foreign_fields import Unsupported, is_nothing
from ds_cp.api.requests.messages import plain_text
from ds_cp.api.requests.sampling import CommonRequest
from ds_cp.api.requests.strict_model import StrictModel, notes_of, sift
from ds_cp.api.responses.fields import (
    BODY,
    ENCRYPTED,
    HARMLESS,
    INCLUDE_NOTHING,
    LOGPROBS,
    REASONING,
)
from ds_cp.api.responses.items import MAX_ID_CHARS, Item, read_input
from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import MAX_INTEGER_BITS, StructuredOutputsParams
from ds_cp.parsing.definitions import Tool, ToolChoice, read_choice
from ds_cp.sampling_params import MAX_LOGPROBS

MAX_METADATA = 16  # entries of metadata
MAX_KEY_CHARS, MAX_VALUE_CHARS = 64, 512  # of an entry
MAX_INCLUDE = 16  # names in include
_FORMAT = ("type", "name", "schema", "strict", "description")
_FUNCTION = ("type", "name", "description", "parameters", "strict")


class TextConfig(StrictModel):
    """``format``: text, json_object or json_schema."""

    harmless: ClassVar[frozenset[str]] = HARMLESS["text"]

    format: dict[str, Any] | None = Field(None, max_length=16)

    @field_validator("format")
    @classmethod
    def _format(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if not value:
            return None
        check_depth(value, "text.format", "")
        try:
            check_values(value, "text.format")  # it is given back
        except FieldError as err:
            raise FieldError(str(err)) from None
        kept = sift("text.format", value, _FORMAT, {}, frozenset(), notes_of(info))
        if not isinstance(kept.get("description"), str | None):
            raise FieldError("text.format.description must be text", "description")
        try:  # the response says it again, under any type
            check_values(kept, "text.format", most_bits=MAX_INTEGER_BITS)
        except FieldError as err:
            raise FieldError(str(err)) from None  # it names this field
        return kept


class ReasoningConfig(StrictModel):
    """``effort``: how long the model thinks, where its template can be told."""

    harmless: ClassVar[frozenset[str]] = HARMLESS["reasoning"]
    unsupported: ClassVar[dict[str, Unsupported]] = REASONING

    effort: Effort | None = None


class ResponseStreamOptions(StrictModel):
    """Nothing that is served."""

    harmless: ClassVar[frozenset[str]] = HARMLESS["stream_options"]


class ResponseInput(CommonRequest):
    """What is read of a request to answer it or to count its tokens."""

    harmless: ClassVar[frozenset[str]] = HARMLESS["body"]
    unsupported: ClassVar[dict[str, Unsupported]] = BODY

    input: list[Item] | None = Field(None, description="text, or a list of items")
    instructions: str | None = Field(None, description="the system message; not carried over")
    previous_response_id: str | None = Field(None, max_length=MAX_ID_CHARS)
    tools: list[Tool] | None = Field(None, description="functions; hosted tools are skipped")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required, or an object that names a function"
    )
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: the beginning of an input that is too long is left out"
    )

    _constraint: StructuredOutputsParams | None = PrivateAttr(None)
    _choice: ToolChoice = PrivateAttr(ToolChoice("none"))

    @field_validator(
        "input", mode="plain", json_schema_input_type=str | list[dict[str, Any]] | None
    )
    @classmethod
    def _input(cls, value: Any, info: ValidationInfo) -> list[Item] | None:
        return None if value is None else read_input(value, notes_of(info))

    @field_validator("instructions")
    @classmethod
    def _instructions(cls, value: str | None) -> str | None:
        return value if value is None else plain_text(value, "instructions")

    @field_validator("tools", mode="plain", json_schema_input_type=list[dict[str, Any]] | None)
    @classmethod
    def _tools(cls, value: Any, info: ValidationInfo) -> list[Tool] | None:
        notes = notes_of(info)

        def as_function(tool: Mapping[str, Any]) -> Mapping[str, Any] | None:
            if tool.get("type") != "function":
                return None
            return sift("tool", tool, _FUNCTION, {}, HARMLESS["tool"], notes)

        return None if value is None else read_client_tools(value, as_function, notes)

    @field_validator(
        "tool_choice", mode="plain", json_schema_input_type=str | dict[str, Any] | None
    )
    @classmethod
    def _tool_choice(cls, value: Any) -> Any:
        if is_nothing(value):
            return None
        if not isinstance(value, str | dict):
            raise FieldError("tool_choice must be a mode or an object that names a function")
        check_depth(value, "tool_choice", "")
        return value

    @model_validator(mode="after")
    def _read_choice(self) -> ResponseInput:
        choice: Any = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            choice = {"type": "allowed_tools", "allowed_tools": choice}
        elif isinstance(choice, dict) and choice.get("type") != "function":
            raise FieldError(
                f"tool_choice.type {shown(choice.get('type'))} is not supported: hosted tools are "
                "not served; name a function, or say auto, required or none",
                "tool_choice",
            )
        try:
            self._choice = read_choice(choice, self.tools or [], self.parallel_tool_calls)
        except RequestError as err:
            found = in_place(err, "", {".function": "", ".allowed_tools": ""})
            raise FieldError(str(found), found.param) from None
        return self

    @model_validator(mode="after")
    def _read_format(self) -> ResponseInput:
        self._constraint = _constraint(self.text.format if self.text else None)
        return self

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """What ``text.format`` asks for; None for free text."""
        return self._constraint

    @property
    def choice(self) -> ToolChoice:
        """Which tools may be called."""
        return self._choice


class ResponseRequest(ResponseInput):
    """POST /v1/responses. Without ``max_output_tokens``, as many tokens as fit."""

    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, description="new tokens at most")
    top_logprobs: int | None = Field(None, description=f"0 to {MAX_LOGPROBS}")
    include: list[str] | None = Field(None, max_length=MAX_INCLUDE, fail_fast=True)
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)
    store: bool | None = Field(None, description="whether the response is kept; default true")
    background: bool | None = Field(None, description="answer at once, and follow it by GET")

    @field_validator("include")
    @classmethod
    def _include(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if name not in (LOGPROBS, ENCRYPTED, *INCLUDE_NOTHING):
                raise FieldError(f"include has {shown(name)}, which is not known")
        return value

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for key, text in (value or {}).items():
            if len(key) > MAX_KEY_CHARS or len(text) > MAX_VALUE_CHARS:
                raise FieldError(
                    f"metadata has an entry of {len(key)} and {len(text)} characters; at most "
                    f"{MAX_KEY_CHARS} of a key and {MAX_VALUE_CHARS} of a value"
                )
            plain_text(key + text, "metadata")
        return value

    @model_validator(mode="after")
    def _pairs(self) -> ResponseRequest:
        if self.input is None and self.previous_response_id is None:
            raise FieldError("input is missing; it is required", "input")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise FieldError(
                f"top_logprobs is only allowed with include {LOGPROBS}", "top_logprobs"
            )
        if self.background and self.store is False:
            raise FieldError("background needs store: the answer is asked for later", "background")
        if self.background and self.stream:
            raise FieldError(
                "background is not supported with stream true; ask for it by GET", "background"
            )
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the texts come with log-probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def wants_sealed(self) -> bool:
        """Whether reasoning comes in the form that a client without a store sends back."""
        return ENCRYPTED in (self.include or ())


def _constraint(wish: dict[str, Any] | None) -> StructuredOutputsParams | None:
    """The constraint that ``text.format`` spells. Raises ``FieldError``."""
    if wish is None or wish.get("type") == "text":
        return None
    if wish.get("type") not in ("json_object", "json_schema"):
        raise FieldError(
            "text.format.type must be text, json_object or json_schema, not "
            f"{shown(wish.get('type'))}",
            "text.format",
        )
    if wish["type"] == "json_schema" and not isinstance(wish.get("schema"), dict):
        raise FieldError("text.format.schema must be a JSON schema: an object", "text.format")
    named = {name: wish.get(name) for name in ("name", "schema", "strict")}
    return constraint_as("text.format", {"type": wish["type"], "json_schema": named})
