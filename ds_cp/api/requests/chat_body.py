"""The bodies that hold a conversation: POST /v1/chat/completions and /tokenize."""

from __future__ import annotations

from math import isfinite
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ds_cp.api.chat.request import NO_TOOLS, Effort, Turn
from ds_cp.api.errors import FieldError
from ds_cp.api.requests.engine_fields import MAX_MODEL_CHARS
from ds_cp.api.requests.foreign_fields import BOTH, CHAT_ONLY, TOKENIZE, Unsupported, is_nothing
from ds_cp.api.requests.messages import (
    MAX_MESSAGES,
    ChatMessage,
    in_fields,
    plain_text,
    turns_of,
)
from ds_cp.api.requests.protocol import SamplingRequest
from ds_cp.api.requests.strict_model import StrictModel
from ds_cp.parsing.definitions import (
    MAX_TOOLS,
    Tool,
    ToolChoice,
    count_values,
    read_choice,
    read_tools,
)

MAX_TEMPLATE_KWARGS = 64  # names in chat_template_kwargs
MAX_KWARGS_VALUES = 256  # values in it, of any kind
MAX_BITS = 63  # of an integer in a schema or in chat_template_kwargs
MAX_KWARG_CHARS = 4096  # characters of one text in it
_FINAL = "continue_final_message goes on with the last message, so that"


class TemplateFields(StrictModel):
    """What a conversation's template is told besides the messages."""

    tools: list[Any] | None = Field(
        None, max_length=MAX_TOOLS, description="functions that the model may call"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        max_length=MAX_TEMPLATE_KWARGS,
        description="values of names that the model's chat template reads",
    )
    add_generation_prompt: bool | None = Field(
        None, description="end the prompt where an answer begins; true unless the last is continued"
    )
    continue_final_message: bool | None = Field(
        None, description="go on with the last message, an assistant's, in place of a new one"
    )

    _tools: list[Tool] = PrivateAttr(default_factory=list)
    _turns: list[Turn] = PrivateAttr(default_factory=list)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _kwargs(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return checked_kwargs(value)

    @field_validator("tools", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        return None if is_nothing(value) else value

    def _read_conversation(self, messages: list[ChatMessage]) -> None:
        """Read tools and turns. Raises ``FieldError``."""
        with in_fields():
            self._tools = read_tools(self.tools)
        for tool in self._tools:
            check_values([tool.description, tool.parameters], "tools")
        self._turns = turns_of(messages)
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            raise FieldError(
                f"{_FINAL} add_generation_prompt cannot be true with it", "add_generation_prompt"
            )
        last = self._turns[-1] if self._turns else None  # /tokenize may have a prompt instead
        if last is None or last.role != "assistant" or not last.content or last.calls:
            raise FieldError(
                f"{_FINAL} must be an assistant's, with text and without tool_calls",
                "continue_final_message",
            )

    @property
    def turns(self) -> list[Turn]:
        """The conversation."""
        return self._turns

    @property
    def functions(self) -> list[Tool]:
        """The tools, read."""
        return self._tools

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends where an answer begins."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


def checked_kwargs(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """``chat_template_kwargs``, bounded. Raises ``FieldError``."""
    for name, wish in (value or {}).items():
        plain_text(name, "chat_template_kwargs")
        with in_fields():
            if count_values(wish, name) > MAX_KWARGS_VALUES:
                raise FieldError(f"{name} has more than {MAX_KWARGS_VALUES} values", name)
        check_values(wish, name, MAX_KWARG_CHARS)
    return value


def check_values(
    value: Any, name: str, most_chars: int | None = None, most_bits: int = MAX_BITS
) -> None:
    """Raises ``FieldError`` for what cannot be passed on: half a surrogate pair, a number beyond
    the floats, an integer of more than ``most_bits``, a text of more than ``most_chars``."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            if most_chars is not None and len(one) > most_chars:
                raise FieldError(f"{name} has {len(one)} characters; at most {most_chars}", name)
            plain_text(one, name, name)
        elif isinstance(one, float) and not isfinite(one):
            raise FieldError(f"{name} has a number that is too large for a float", name)
        elif isinstance(one, int) and one.bit_length() > most_bits:
            raise FieldError(f"{name} has an integer of {one.bit_length()} bits", name)
        elif isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, list):
            todo += one


class ChatCompletionRequest(SamplingRequest, TemplateFields):
    """POST /v1/chat/completions. Without ``max_tokens``, as many tokens as fit.

    ``tool_choice``: none, auto, required, a function, or allowed_tools; without ``tools`` it is
    none. ``include_reasoning`` false leaves reasoning out of the answer, not the model's time.
    """

    unsupported: ClassVar[dict[str, Unsupported]] = BOTH | CHAT_ONLY

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required, or an object that names a function"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    reasoning_effort: Effort | None = Field(None, description="for templates that read it")
    include_reasoning: bool | None = None

    _choice: ToolChoice = PrivateAttr(NO_TOOLS)

    @field_validator(
        "tool_choice", mode="plain", json_schema_input_type=str | dict[str, Any] | None
    )
    @classmethod
    def _tool_choice(cls, value: Any) -> Any:
        """Its names are looked up once the tools are known."""
        if is_nothing(value):
            return None
        if not isinstance(value, str | dict):
            raise FieldError("tool_choice must be a mode or an object that names a function")
        return value

    @model_validator(mode="after")
    def _read(self) -> ChatCompletionRequest:
        self._read_conversation(self.messages)
        with in_fields():
            self._choice = read_choice(self.tool_choice, self.functions, self.parallel_tool_calls)
        asked = self.constraint.asked_as if self.constraint else None
        # A response_format is of the text of an answer, and a call has none.
        if self._choice.mode == "required" and asked not in (None, "response_format"):
            raise FieldError(
                f"tool_choice says that the answer is a call and {asked} what it is; send one",
                asked,
            )
        return self

    @model_validator(mode="after")
    def _pairs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs is only allowed with logprobs true", "top_logprobs")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise FieldError(
                f"max_tokens is {old} and max_completion_tokens is {new}; send one of them",
                "max_completion_tokens",
            )
        return self

    @property
    def choice(self) -> ToolChoice:
        """Which tools may or must be called."""
        return self._choice


class TokenizeRequest(TemplateFields):
    """POST /tokenize: either ``prompt`` or ``messages``."""

    unsupported: ClassVar[dict[str, Unsupported]] = TOKENIZE

    model: str | None = Field(None, max_length=MAX_MODEL_CHARS)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    add_special_tokens: bool = Field(True, description="for prompt; a chat template brings its own")

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("send either prompt or messages", "prompt")
        if self.prompt is not None:
            plain_text(self.prompt, "prompt", "prompt")
        self._read_conversation(self.messages or [])
        return self
