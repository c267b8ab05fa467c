"""The response object of the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import time
from typing import Any

from ds_cp.api.answers.json_pieces import items_of, json_array, json_object, json_text
from ds_cp.api.chat.events import FinishReason, Usage
from ds_cp.api.errors import ApiError
from ds_cp.api.responses.items import Item
from ds_cp.api.responses.request import ResponseRequest

Json = dict[str, Any]

_SLICE = 64  # log-probabilities with their alternatives in one piece


def new_response(body: ResponseRequest, response_id: str, model: str) -> Json:
    """A response before its answer has begun; what the request did not say, as it is taken."""
    effort = body.reasoning.effort if body.reasoning else None
    wish = body.text.format if body.text else None
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": wish or {"type": "text"}},
        "tool_choice": _choice(body),
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description or None,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": None,
    }


def _choice(body: ResponseRequest) -> Any:
    """``tool_choice`` as it was read."""
    wish, choice = body.tool_choice, body.choice
    if not isinstance(wish, dict):
        return wish or "auto"
    named = [{"type": "function", "name": name} for name in choice.names]
    if wish["type"] == "function":
        return named[0]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": named}


def finished(response: Json, output: Sequence[Item], reason: FinishReason, usage: Usage) -> Json:
    """The response at its end."""
    cut = reason == "length"
    return response | {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "completed_at": None if cut else int(time()),
        "output": list(output),
        "usage": usage_of(usage),
    }


def failed(response: Json, output: Sequence[Item], error: ApiError) -> Json:
    """The response after an error; ``code`` is one of the few that the protocol has."""
    code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(error.status_code)
    about = {"code": code or "server_error", "message": error.detail}
    return response | {"status": "failed", "error": about, "output": list(output)}


def cancelled(response: Json) -> Json:
    """The response of which no more comes."""
    return response | {"status": "cancelled"}


def in_pieces(response: Json) -> Iterator[bytes]:
    """The response as JSON in pieces, however long its texts and log-probabilities are."""
    return json_object(response | {"output": json_array(map(_item, response["output"]))})


def _item(item: Item) -> Iterator[bytes]:
    if item["type"] != "message":
        return json_object(item)
    return json_object(item | {"content": json_array(map(_part, item["content"]))})


def _part(part: Json) -> Iterator[bytes]:
    entries = part["logprobs"]
    slices = (items_of(entries[i : i + _SLICE]) for i in range(0, len(entries), _SLICE))
    return json_object(part | {"text": json_text(part["text"]), "logprobs": json_array(slices)})


def usage_of(usage: Usage) -> Json:
    """Token counts; cached tokens are those found in the prefix cache."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
