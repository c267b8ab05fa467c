"""Server-sent events, read with a bound."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

from ds_cp.errors import ServerError

MAX_EVENT_BYTES = 1 << 23  # bytes of one event
DONE = "[DONE]"  # data after the last event of a chat


async def events(
    response: httpx.Response, limit: int = MAX_EVENT_BYTES
) -> AsyncIterator[str | None]:
    """The data of each event, and None for each comment, with which a server shows that it is
    alive. ``ServerError`` beyond ``limit`` bytes, for what is not UTF-8, or no stream of events."""
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise ServerError(f"the server's answer is no stream of events, but {kind[:60]!r}")
    rest = b""
    data: list[str] = []
    size = 0
    async for received in response.aiter_raw():
        *lines, rest = (rest + received).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b":"):
                yield None
            elif line.startswith(b"data:"):
                size += len(line)
                if size > limit:
                    raise _too_large(limit)
                data.append(_text(line[5:].removeprefix(b" ")))
            elif not line and data:
                yield "\n".join(data)
                data, size = [], 0
        if size + len(rest) > limit:
            raise _too_large(limit)


def _too_large(limit: int) -> ServerError:
    return ServerError(f"the server sent an event of more than {limit} bytes")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise ServerError(
            f"the server's stream is not UTF-8: wrong byte at {err.start} of a line"
        ) from None
