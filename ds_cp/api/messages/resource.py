"""The message object of Anthropic's protocol, and what its stream begins and ends with."""

from __future__ import annotations

from typing import Any

from ds_cp.api.chat.events import Finished, Usage

Json = dict[str, Any]

_STOP_REASONS = {"tool_calls": "tool_use", "length": "max_tokens"}


def new_message(message_id: str, model: str, prompt_tokens: int) -> Json:
    """A message before its answer has begun: how much of the prompt was cached is not known yet."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        },
    }


def stop_of(finished: Finished, *, clamped: bool) -> tuple[str, str | None]:
    """``stop_reason`` and ``stop_sequence``. ``clamped``: max_tokens was lowered to what fits, so
    that an answer of this length has filled the model's context."""
    if finished.reason == "length" and clamped:
        return "model_context_window_exceeded", None
    if finished.reason == "stop" and isinstance(finished.stop_reason, str):
        return "stop_sequence", finished.stop_reason
    return _STOP_REASONS.get(finished.reason, "end_turn"), None


def usage_of(usage: Usage) -> Json:
    """Token counts; those of the input are without what was found in the prefix cache."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


def end_event(stop_reason: str, stop_sequence: str | None, usage: Usage) -> Json:
    """The event before the last one of a stream."""
    delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
    return {"type": "message_delta", "delta": delta, "usage": usage_of(usage)}
