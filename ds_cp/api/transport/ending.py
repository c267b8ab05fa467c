"""How the end of an answer ends its connection, where that is not as uvicorn has it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def end_early(cycle: RequestResponseCycle, on_end: Callable[[], None]) -> None:
    """Let an answer before the whole body say that its connection closes, and call ``on_end`` with
    its end instead of closing: the client may be sending still, and a reset could take the answer
    from it."""
    send = cycle.send

    async def early_send(message: Message) -> None:
        if cycle.more_body and message["type"] == "http.response.start":
            cycle.keep_alive = False
        elif cycle.more_body and not message.get("more_body", False):
            cycle.keep_alive = True
            on_end()
        await send(message)  # type: ignore[arg-type]

    cycle.send = early_send  # type: ignore[method-assign, assignment]


def end_by_closing(cycle: RequestResponseCycle) -> None:
    """Make the end of the connection the end of the answer: HTTP/1.0 knows no chunks (RFC 9112,
    6.1)."""
    send = cycle.send

    async def plain_send(message: Message) -> None:
        if message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)  # type: ignore[arg-type]

    cycle.chunked_encoding = False
    cycle.send = plain_send  # type: ignore[method-assign, assignment]
