"""One streamed answer of ``/v1/completions``, with the times of its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from ds_cp.client.chat import count_of
from ds_cp.client.connection import Server, answered, as_json, error_of
from ds_cp.client.events import DONE, events
from ds_cp.errors import ServerError

PATH = "/v1/completions"
MAX_PARTS = 1 << 24  # parts of one answer


@dataclass
class Timed:
    """An answer. ``times``: of each part with text, in seconds since it was asked for; ``end_s``:
    of its end; tokens as the server counts them."""

    times: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def timed_completion(
    server: Server, client: httpx.AsyncClient, body: Mapping[str, Any]
) -> Timed:
    """Ask, and read to the end. Raises as ``answered`` does, and ``ServerError`` for an error in
    the stream, or one that breaks off."""
    found = Timed()
    began = time.perf_counter()
    whole = False
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with answered(server, client, "POST", PATH, streamed) as response:
        async for data in events(response):
            if data is None:
                continue
            if data == DONE:
                whole = True
                break
            chunk = as_json(data.encode("utf-8", "surrogatepass"))
            if (message := error_of(chunk)) is not None:
                raise ServerError(message)
            if not isinstance(chunk, dict) or len(found.times) > MAX_PARTS:
                raise ServerError("the server's stream is not one of completions")
            choices = chunk.get("choices")
            if isinstance(choices, list) and choices and isinstance(choices[0], dict):
                if choices[0].get("text") or choices[0].get("finish_reason"):
                    found.times.append(time.perf_counter() - began)
            usage = chunk.get("usage")
            if isinstance(usage, dict):
                found.prompt_tokens = count_of(usage.get("prompt_tokens"))
                found.completion_tokens = count_of(usage.get("completion_tokens"))
    if not whole:
        raise ServerError(f"{server.url} broke off its answer")
    found.end_s = time.perf_counter() - began
    return found
