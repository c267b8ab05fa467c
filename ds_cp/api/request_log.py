"""One line for each answer that has ended: ids, counts and times. Never its text or its prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ds_cp.log_stream import say, say_object
from ds_cp.outputs import EndedRequest


class RequestLog:
    """Writes the lines to stderr, which waits for nobody in a server."""

    def __init__(self, model_name: Callable[[], str], as_json: bool) -> None:
        self._model_name = model_name
        self._as_json = as_json

    def __call__(self, ended: EndedRequest) -> None:
        """Write one line."""
        model = self._model_name()
        if self._as_json:
            say_object(json_of(ended, model))
        else:
            say(text_of(ended, model))


def json_of(ended: EndedRequest, model: str) -> dict[str, Any]:
    """The line as an object; times in seconds, null for what the answer did not come to."""

    def rounded(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds, 6)

    return {
        "time": round(time.time(), 3),
        "level": "info",
        "event": "request",
        "id": ended.request_id,
        "index": ended.index,
        "request_id": ended.http_id,
        "model": model,
        "prompt_tokens": ended.prompt_tokens,
        "cached_tokens": ended.cached_tokens,
        "new_tokens": ended.new_tokens,
        "queue_s": rounded(ended.queue_s),
        "ttft_s": rounded(ended.ttft_s),
        "tpot_s": rounded(ended.tpot_s),
        "e2e_s": rounded(ended.e2e_s),
        "modes": list(ended.modes),
        "ranks": list(ended.ranks),
        "preemptions": ended.preemptions,
        "finish_reason": ended.finish_reason,
    }


def text_of(ended: EndedRequest, model: str) -> str:
    """The line for people."""
    ids = f"request {ended.request_id}" + (f" ({ended.http_id})" if ended.http_id else "")
    cached = f" ({ended.cached_tokens} cached)" if ended.cached_tokens else ""
    times = [
        f"{name} {seconds:.4g} s"
        for name, seconds in (
            ("queued", ended.queue_s), ("ttft", ended.ttft_s), ("tpot", ended.tpot_s),
            ("e2e", ended.e2e_s),
        )
        if seconds is not None
    ]  # fmt: skip
    ranks = ", ".join(map(str, ended.ranks)) or "none"
    return (
        f"{ids} of {json.dumps(model)}: {ended.prompt_tokens}{cached} + {ended.new_tokens} tokens, "
        f"{', '.join(times)}; {' then '.join(ended.modes) or 'no step'} on ranks {ranks}; "
        f"{ended.finish_reason}"
    )
