"""The live picture of a server: ``GET /state``, once or as it changes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import httpx
import msgspec

from ds_cp.client.connection import Server, answered, read
from ds_cp.client.events import events
from ds_cp.engine.picture import Picture
from ds_cp.errors import RequestError, ServerError

PATH = "/state"


@dataclass(frozen=True)
class RatesPicture:
    """What a server did a second, over the last seconds."""

    generation_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    steps_per_s: float = 0.0
    comm_bytes_per_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """A server at one moment; ``picture`` is None while it starts. ``at``: epoch seconds."""

    at: float
    state: str
    model: str | None
    max_model_len: int | None
    rates: RatesPicture | None
    picture: Picture | None


async def frame_once(server: Server, client: httpx.AsyncClient) -> Frame:
    """One frame. Raises as ``answered`` does, and ``ServerError`` for what is none."""
    try:
        async with answered(server, client, "GET", f"{PATH}?once=1") as response:
            return frame_of(await read(response))
    except RequestError as err:
        raise _without(server, err) from None


async def frames(server: Server, client: httpx.AsyncClient) -> AsyncGenerator[Frame, None]:
    """Frames as they change, until the server ends. Raises as ``frame_once`` does."""
    try:
        async with answered(server, client, "GET", PATH) as response:
            async for data in events(response):
                if data is not None:
                    yield frame_of(data.encode("utf-8", "surrogatepass"))
    except RequestError as err:
        raise _without(server, err) from None


def frame_of(data: bytes) -> Frame:
    """A frame from JSON. ``ServerError`` when it is none that this version knows."""
    try:
        return msgspec.json.decode(data, type=Frame)
    except (msgspec.MsgspecError, ValueError) as err:
        raise ServerError(
            f"what the server says of its state is not known here ({err}); "
            "use the ds-cp of the server's version"
        ) from None


def _without(server: Server, err: RequestError) -> RequestError:
    if "404" not in str(err):
        return err
    return RequestError(f"{server.url} has no {PATH}: it is no ds_cp server, or an old one")
