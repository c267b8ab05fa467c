"""Batches for tests: lines, the real application over a fake engine, answers in memory."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from ds_cp.api.app import create_app
from ds_cp.batch.format import BatchRequest, Problem, read_requests
from ds_cp.batch.runner import BatchReport, run_batch
from ds_cp.config import Server

LIMIT = 4096
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id: Any, prompt: Any = "a fox", **body: Any) -> str:
    """A good line of /v1/completions."""
    body = {"prompt": prompt, "max_tokens": 3} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": TEXT, "body": body})


def parsed(*lines: str | bytes, limit: int = LIMIT) -> list[BatchRequest | Problem]:
    data = b"\n".join(text.encode() if isinstance(text, str) else text for text in lines)
    return list(read_requests(io.BytesIO(data), limit))


def requests_of(*lines: str) -> list[BatchRequest]:
    found = parsed(*lines)
    assert all(isinstance(item, BatchRequest) for item in found)
    return found  # type: ignore[return-value]


@asynccontextmanager
async def opened(engine: Any, **settings: Any) -> AsyncIterator[Any]:
    app = create_app(engine, Server(**settings))
    async with app.router.lifespan_context(app):
        yield app


class Sink(list[Any]):
    """Takes answers, a whole line each."""

    def __call__(self, data: bytes) -> None:
        assert data.endswith(b"\n") and data.count(b"\n") == 1
        self.append(json.loads(data))

    @property
    def by_id(self) -> dict[str, Any]:
        assert len({answer["custom_id"] for answer in self}) == len(self)
        return {answer["custom_id"]: answer for answer in self}


def within(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, seconds))


def run(engine: Any, requests: Any, sink: Callable[[bytes], None], **options: Any) -> BatchReport:
    settings = options.pop("settings", {})
    given = {"concurrency": 4, "on_broken": lambda problem: None} | options

    async def main() -> BatchReport:
        async with opened(engine, **settings) as app:
            return await run_batch(app, requests, sink, **given)

    return within(30, main())


async def reply(send: Any, status: int, body: Any, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    data = json.dumps(body).encode()
    await send({"type": "http.response.body", "body": data[:2], "more_body": True})
    await send({"type": "http.response.body", "body": data[2:]})


def answer_line(custom_id: str, status: int | None = 200, **body: Any) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": body} if status else None
    error = None if status else {"code": "no_answer", "message": "m"}
    whole = {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": response}
    return json.dumps(whole | {"error": error}).encode() + b"\n"
