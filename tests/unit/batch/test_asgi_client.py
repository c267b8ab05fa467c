"""A request to an ASGI application in this process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from ds_cp.batch.asgi_client import ask
from tests.helpers.batches import TEXT, opened, reply, within
from tests.helpers.fake_engine import FakeEngine, make_tokenizer


def test_receive_says_that_the_client_left_once_it_is_over() -> None:
    late: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive()) == {"type": "http.request", "body": b"{}", "more_body": False}
        late.append(asyncio.create_task(receive()))
        await reply(send, 200, {"a": 1}, (b"X-Request-Id", b"r"))

    async def main() -> None:
        answer = await ask(app, TEXT, b"{}")
        assert (answer.status, answer.request_id, answer.body) == (200, "r", {"a": 1})
        assert (await late[0])["type"] == "http.disconnect"

    within(60, main())


def test_an_answer_without_its_end_is_no_answer() -> None:
    """What has come of it may be valid JSON all the same."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}", "more_body": True})

    with pytest.raises(ValueError, match="cut off"):
        within(60, ask(app, TEXT, b"{}"))


def test_a_large_answer_comes_in_several_messages() -> None:
    engine = FakeEngine(make_tokenizer(), max_model_len=4096)
    sizes: list[int] = []

    async def main() -> Any:
        async with opened(engine) as app:

            async def watched(scope: Any, receive: Any, send: Any) -> None:
                async def counted(message: Any) -> None:
                    sizes.append(len(message.get("body", b"")))
                    await send(message)

                await app(scope, receive, counted)

            body = {"prompt": [5], "max_tokens": 1500, "logprobs": 20}
            return await ask(watched, TEXT, json.dumps(body).encode())

    answer = within(60, main())
    assert answer.status == 200 and answer.body["usage"]["completion_tokens"] == 1500
    assert len(answer.body["choices"][0]["logprobs"]["top_logprobs"]) == 1500
    assert sum(size > 0 for size in sizes) > 2 and max(sizes) < 200_000
