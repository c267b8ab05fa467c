"""One answer of ``/v1/chat/completions`` as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx

from ds_cp.client.connection import Server, answered, as_json, error_of, get_json
from ds_cp.client.events import DONE, events
from ds_cp.errors import RequestError, ServerError

PATH = "/v1/chat/completions"
MAX_ANSWER_CHARS = 1 << 26  # characters of one answer
# Fields that a server may not know; without them the answer is the same.
OPTIONAL: Mapping[str, Any] = {"return_progress": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Begun:
    """The server has taken the request. ``id``: of its answer."""

    id: str


@dataclass(frozen=True)
class Progress:
    """Tokens of the prompt that are processed, of ``total``; ``cached`` of them were known."""

    processed: int
    total: int
    cached: int


@dataclass(frozen=True)
class Piece:
    """Some text of the answer, or of the reasoning before it."""

    text: str
    reasoning: bool = False


@dataclass(frozen=True)
class Usage:
    """Tokens of an answer."""

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True)
class Ended:
    """Why an answer ended: "stop", "length", ..."""

    finish_reason: str


Event: TypeAlias = Begun | Progress | Piece | Usage | Ended


async def chat_events(
    server: Server, client: httpx.AsyncClient, body: Mapping[str, Any]
) -> AsyncGenerator[Event, None]:
    """The events of one streamed answer. ``body``: a request without ``stream``.

    Raises as ``answered`` does, and ``ServerError`` for an error within the stream, one that breaks
    off, or what is not the protocol.
    """
    wanted = dict(OPTIONAL)
    while True:
        try:
            async for event in _events(server, client, {**body, **wanted, "stream": True}):
                yield event
            return
        except RequestError as err:
            named = [name for name in wanted if name in str(err)]
            if not named:
                raise
            del wanted[named[0]]  # refused before anything was answered


async def _events(
    server: Server, client: httpx.AsyncClient, body: Mapping[str, Any]
) -> AsyncGenerator[Event, None]:
    begun = ended = False
    chars = 0
    async with answered(server, client, "POST", PATH, body) as response:
        async for data in events(response):
            if data is None:
                continue
            if data == DONE:
                ended = True
                break
            chunk = as_json(data.encode("utf-8", "surrogatepass"))
            if (message := error_of(chunk)) is not None:
                raise ServerError(message)
            if not isinstance(chunk, dict):
                raise ServerError("the server's stream is not one of chat completions")
            if not begun:
                begun = True
                yield Begun(text_of(chunk.get("id")))
            for event in _parts(chunk):
                if isinstance(event, Piece):
                    chars += len(event.text)
                    if chars > MAX_ANSWER_CHARS:
                        raise ServerError(f"the answer has more than {MAX_ANSWER_CHARS} characters")
                ended = ended or isinstance(event, Ended)
                yield event
    if not ended:
        raise ServerError(f"{server.url} broke off its answer")


def _parts(chunk: Mapping[str, Any]) -> list[Event]:
    """What one chunk says."""
    found: list[Event] = []
    progress = chunk.get("prompt_progress")
    if isinstance(progress, dict):
        count = [count_of(progress.get(name)) for name in ("processed", "total", "cache")]
        found.append(Progress(*count))
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    delta = choice.get("delta") if isinstance(choice, dict) else None
    if isinstance(delta, dict):
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        for text, reasoning in ((thought, True), (delta.get("content"), False)):
            if isinstance(text, str) and text:
                found.append(Piece(text, reasoning))
    if isinstance(choice, dict) and isinstance(choice.get("finish_reason"), str):
        found.append(Ended(choice["finish_reason"]))
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else 0
        tokens = (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)
        found.append(Usage(*map(count_of, tokens)))
    return found


async def first_model(server: Server, client: httpx.AsyncClient) -> tuple[str, int | None]:
    """The name of the server's first model, and its length in tokens where the server says it.
    ``ServerError`` when it names none."""
    found = await get_json(server, client, "/v1/models")
    models = found.get("data") if isinstance(found, dict) else None
    first = models[0] if isinstance(models, list) and models else None
    name = first.get("id") if isinstance(first, dict) else None
    if not isinstance(name, str) or not name:
        raise ServerError(f"{server.url} names no model; name one with --model")
    return name, count_of(first.get("max_model_len")) or None  # type: ignore[union-attr]


def text_of(value: Any) -> str:
    """A server's string; anything else is empty."""
    return value if isinstance(value, str) else ""


def count_of(value: Any) -> int:
    """A server's count; anything else is 0."""
    fine = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
    return value if fine else 0
