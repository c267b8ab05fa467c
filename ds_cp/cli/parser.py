"""Parsers of the command line: every flag has a twin in the environment, and a flag wins.

The twin of a flag is its command and its name in capitals, joined by lines: ``ds-cp bench comm
--out`` is ``DS_CP_BENCH_COMM_OUT``. An empty variable counts as not set. A switch takes 1, true,
yes, on or 0, false, no, off; a flag with several values takes words as a shell splits them.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from ds_cp.cli.output import put
from ds_cp.errors import LaunchError
from ds_cp.text import shorten

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"  # what add_subparsers gives
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
MAX_CHARS = 1 << 20  # characters of a variable


class _Formatter(argparse.HelpFormatter):
    """Help that names the twin of each flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        twin = twin_of(self._prog, action)
        return f"{action.help or ''} [{twin}]" if twin else action.help


class Parser(argparse.ArgumentParser):
    """Usage mistakes, and help that cannot be printed, are our one-line errors too. ``env``: where
    the twins of its flags are looked for."""

    def __init__(self, **settings: Any) -> None:
        ours: dict[str, Any] = {"allow_abbrev": False, "formatter_class": _Formatter}
        super().__init__(**(ours | settings))
        self.env: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        """Raise ``LaunchError``."""
        raise LaunchError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help on stdout. ``OutputError`` when it cannot be written."""
        put(self.format_help().rstrip("\n"))

    def read(self, argv: list[str] | None, env: Mapping[str, str]) -> argparse.Namespace:
        """The arguments, from ``argv`` (None: of this process) and then from the environment."""
        for _, parser in walk(self):
            parser.env = env
        return self.parse_args(argv)

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse has it, with twins for the flags that are not given."""
        wanted = flags(self)
        texts = {a: text for a in wanted if (text := self.env.get(twin_of(self.prog, a) or ""))}
        groups = self._mutually_exclusive_groups
        needed: list[Any] = [x for x in [*wanted, *groups] if getattr(x, "required", False)]
        defaults = [(action, action.default) for action in wanted]
        for action in wanted:
            action.default = argparse.SUPPRESS  # so that what is given can be told
        for one in needed:
            members = getattr(one, "_group_actions", [one])
            one.required = not any(action in texts for action in members)
        try:
            found, rest = super().parse_known_args(args, namespace)
        finally:
            for action, default in defaults:
                action.default = default
            for one in needed:
                one.required = True
        given = {action for action in wanted if hasattr(found, action.dest)}
        for group in groups:
            members = group._group_actions
            if given.intersection(members):
                texts = {a: text for a, text in texts.items() if a not in members}
            elif len(both := [a for a in members if a in texts]) > 1:
                names = " and ".join(str(twin_of(self.prog, a)) for a in both)
                self.error(f"{names} do not go together; unset one")
        for action in wanted:
            if action not in given:
                value = self._converted(action, texts[action]) if action in texts else None
                setattr(found, action.dest, action.default if value is None else value)
        return found, rest

    def _converted(self, action: argparse.Action, text: str) -> Any:
        """The value of a twin. ``LaunchError`` names the variable."""
        name = twin_of(self.prog, action)
        if len(text) > MAX_CHARS:
            self.error(f"{name} has {len(text)} characters; at most {MAX_CHARS}")
        if action.nargs == 0:
            if text.lower() not in ON + OFF:
                self.error(f"{name} is {shorten(text, 40)}; it must be 1 or 0")
            return action.const if text.lower() in ON else action.default
        try:
            if not takes_several(action):
                return self._one(action, text)
            return [self._one(action, word) for word in shlex.split(text)] or None
        except argparse.ArgumentError as err:
            self.error(f"{name}: {err.message}")
        except ValueError as err:
            self.error(f"{name}: {err}")

    def _one(self, action: argparse.Action, text: str) -> Any:
        value = self._get_value(action, text)
        self._check_value(action, value)
        return value


def takes_several(action: argparse.Action) -> bool:
    """Whether a flag may be repeated, or takes a list of values."""
    return action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)


def flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags of one parser, without --help and those that are not for people."""
    return [
        action
        for action in parser._actions
        if action.option_strings and action.dest != "help" and action.help != argparse.SUPPRESS
    ]


def twin_of(prog: str, action: argparse.Action) -> str | None:
    """The environment variable of a flag of the command ``prog``; None for what has none."""
    names = [name for name in action.option_strings if name.startswith("--")]
    if not names or action.dest == "help" or action.help == argparse.SUPPRESS:
        return None
    return re.sub("[^A-Z0-9]+", "_", f"{prog} {names[0]}".upper())


def walk(parser: Parser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """A parser and all below it, each with its path of verbs."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from walk(below, (*path, name))


def add_json(parser: Parser, what: str) -> None:
    """Add ``--json``; ``what`` is then on stdout, alone, an object a line."""
    parser.add_argument("--json", action="store_true", help=f"on stdout {what}, as JSON")
