"""``ds-cp top``: the live picture of a running server in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ds_cp.cli.chat import add_server
from ds_cp.cli.parser import Verbs, add_json
from ds_cp.cli.signals import terminal_given_back

if TYPE_CHECKING:
    from rich.console import Console

    from ds_cp.client.connection import Server

AGAIN_S = 1.0  # seconds until a server that is gone is looked for again
WIDTH = 120  # columns of a picture that does not go to a terminal


def add_top(verbs: Verbs) -> None:
    """Add ``top`` to the verbs of ``ds-cp``."""
    parser = verbs.add_parser(
        "top",
        help="the live picture of a running server",
        description="Shows what a server does, from its GET /state: ranks by host with their KV, "
        "requests with their mode and its reason, times, rates, bytes on the wire. Ctrl-C leaves. "
        "Where stdout is no terminal there is one picture.",
    )
    add_server(parser)
    parser.add_argument("--once", action="store_true", help="one picture, then leave")
    add_json(parser, "an object for each change, with --once the first")
    parser.set_defaults(verb=_top)


def _top(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Show pictures until Ctrl-C. Raises the errors of a server that is not there at the start, or
    at any time with ``--json``."""
    from rich.console import Console

    from ds_cp.client.connection import Server

    server = Server.of(args.url, args.api_key, args.timeout)
    console = Console(highlight=False)
    try:
        if args.json:
            asyncio.run(_objects(server, once=args.once))
        elif args.once or not console.is_terminal:
            asyncio.run(_once(server, console))
        else:
            with terminal_given_back():
                asyncio.run(_live(server, console))
    except KeyboardInterrupt:
        pass  # the way to leave
    return 0


async def _objects(server: Server, *, once: bool) -> None:
    import json

    import msgspec

    from ds_cp.cli.output import put
    from ds_cp.client.state import Frame, frame_once, frames

    def show(frame: Frame) -> None:
        put(json.dumps(msgspec.to_builtins(frame)))
        sys.stdout.flush()

    async with server.client() as client:
        if once:
            show(await frame_once(server, client))
            return
        async for frame in frames(server, client):
            show(frame)


async def _once(server: Server, console: Console) -> None:
    from ds_cp.cli.output import writing
    from ds_cp.cli.top_picture import draw
    from ds_cp.client.state import frame_once

    async with server.client() as client:
        frame = await frame_once(server, client)
    if not console.is_terminal:
        console.width = WIDTH
    with writing(sys.stdout):
        console.print(draw(frame, server.url, console.width))


async def _live(server: Server, console: Console) -> None:
    """Draw what changes; a server that has left is looked for until Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    from ds_cp.cli.top_picture import draw
    from ds_cp.client.state import frame_once, frames
    from ds_cp.errors import DsCpError

    async with server.client() as client:
        await frame_once(server, client)  # raises what is wrong, before the screen is taken
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                said = f"{server.url} has ended its picture"
                try:
                    async with contextlib.aclosing(frames(server, client)) as found:
                        async for frame in found:
                            picture = draw(frame, server.url, console.width)
                            live.update(picture, refresh=True)
                except DsCpError as err:
                    said = " ".join(str(err).split())
                live.update(Text(f"{said}\nlooking again; Ctrl-C leaves"), refresh=True)
                await asyncio.sleep(AGAIN_S)
