"""A request to an ASGI application in this process."""

from __future__ import annotations

import asyncio
from typing import Any

from ds_cp.batch.asgi_client import ask
from tests.helpers.batches import TEXT, reply, within


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

    within(5, main())
