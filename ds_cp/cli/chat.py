"""``ds-cp chat``: a conversation with a running server, in the terminal or through a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ds_cp.cli.parser import Parser, Verbs, add_json
from ds_cp.cli.settings import SETTINGS

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 300.0  # seconds without a byte; a server sends comments while it works


def add_chat(verbs: Verbs) -> None:
    """Add ``chat`` to the verbs of ``ds-cp``."""
    parser = verbs.add_parser(
        "chat",
        help="talk with a running server",
        description="Talks with a server of OpenAI's protocol. At a terminal: question by "
        "question, /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. From a pipe: "
        "the whole of stdin is one question, below MESSAGE if there is one.",
        epilog="What a server sends is shown as text: control characters in it are made visible.",
    )
    parser.add_argument("message", nargs="?", metavar="MESSAGE", help="ask this and leave")
    add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="default: the server's first")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation of /save")
    parser.add_argument(
        "--lines", action="store_true",
        help="from a pipe: each line is a question or a command, in one conversation",
    )  # fmt: skip
    add_json(parser, "an object for each answer")
    group = parser.add_argument_group("sampling, the server's defaults unless given")
    for flag, kind, what in _sampling():
        group.add_argument(flag, metavar=kind, help=what)
    parser.set_defaults(verb=_chat)


def add_server(parser: Parser) -> None:
    """Add the flags that say which server."""
    parser.add_argument("--url", default=URL, metavar="URL", help=f"of the server; default {URL}")
    parser.add_argument(
        "--api-key", metavar="KEY",
        help="better in the environment: the arguments of a process can be seen by others",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS",
        help=f"without a byte from the server before it is given up; default {TIMEOUT_S:g}",
    )  # fmt: skip


def _sampling() -> list[tuple[str, str, str]]:
    return [
        ("--" + name.replace("_", "-"), "WORDS" if kind is list else "N", what)
        for name, (kind, what) in SETTINGS.items()
    ]


def _chat(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Returns the exit code: 0, 130 when the only answer was stopped by Ctrl-C; of a pipe, that of
    the first error."""
    from ds_cp.cli.chat_session import Session
    from ds_cp.cli.conversation import Conversation
    from ds_cp.cli.signals import terminal_given_back
    from ds_cp.client.connection import Server

    server = Server.of(args.url, args.api_key, args.timeout)
    talk = Conversation.load(args.load) if args.load else Conversation()
    if args.system is not None:
        talk.system = args.system or None
    for name in SETTINGS:
        given: Any = getattr(args, name)
        if given is not None:
            talk.set(name, given)
    session = Session(server, talk, args.model, as_json=args.json, loaded=args.load)
    if args.message is None and sys.stdin.isatty():
        with terminal_given_back():
            return session.converse()
    if args.lines:
        return session.follow(args.message)
    return session.once(args.message)
