"""The response object of the protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    return Pieces().of_response(response)


class Pieces:
    """Responses and their parts as JSON in pieces.

    ``keep``: log-probabilities of a text are encoded once, however often they are written; called
    with the bytes that this takes then. Of one that ends they are written four times.
    """

    def __init__(self, keep: Callable[[int], None] | None = None) -> None:
        self._keep = keep
        # By the id of a list: the list, so that no other one gets its id, and its items.
        self._kept: dict[int, tuple[Any, list[bytes]]] = {}

    def of_response(self, response: Json) -> Iterator[bytes]:
        """The whole response."""
        return json_object(response | {"output": self.of_items(response["output"])})

    def of_items(self, items: Sequence[Item]) -> Iterator[bytes]:
        """Items as a list."""
        return json_array(map(self._item, items))

    def of_event(self, event: Json) -> Iterator[bytes]:
        """An event that has a response, an item, a part or log-probabilities in it."""
        fields = dict(event)
        if "response" in event:
            fields["response"] = self.of_response(event["response"])
        elif "item" in event:
            fields["item"] = self._item(event["item"])
        elif "logprobs" in event.get("part", {}):
            fields["part"] = self._part(event["part"])
        elif "logprobs" in event:
            fields["logprobs"] = self._entries(event["logprobs"])
            if "text" in event:
                fields["text"] = json_text(event["text"])
        return json_object(fields)

    def _item(self, item: Item) -> Iterator[bytes]:
        if item["type"] != "message":
            return json_object(item)
        return json_object(item | {"content": json_array(map(self._part, item["content"]))})

    def _part(self, part: Json) -> Iterator[bytes]:
        fields = part | {"text": json_text(part["text"])}
        if "logprobs" in part:  # an input has none
            fields["logprobs"] = self._entries(part["logprobs"])
        return json_object(fields)

    def _entries(self, entries: list[Any]) -> Iterator[bytes]:
        slices = (items_of(entries[i : i + _SLICE]) for i in range(0, len(entries), _SLICE))
        if self._keep is None or len(entries) <= _SLICE:
            return json_array(slices)
        return json_array(self._once(entries, slices))

    def _once(self, entries: list[Any], slices: Iterator[bytes]) -> Iterator[bytes]:
        assert self._keep is not None
        known = self._kept.get(id(entries))
        if known is not None:
            yield from known[1]
            return
        found: list[bytes] = []
        for piece in slices:
            self._keep(len(piece))
            found.append(piece)
            yield piece
        self._kept[id(entries)] = entries, found


def usage_of(usage: Usage) -> Json:
    """Token counts; cached tokens are those found in the prefix cache."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
