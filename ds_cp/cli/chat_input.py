"""Lines of a person at a terminal, or from a pipe."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import BinaryIO

from ds_cp.cli.prompts import MAX_FILE_BYTES
from ds_cp.errors import RequestError

FENCE = '"""'  # begins and ends a message of several lines


def piped_text() -> str:
    """All of stdin. ``RequestError`` when it is not UTF-8, or too large."""
    return _text(_stdin().read(MAX_FILE_BYTES + 1), "stdin")


def piped_lines() -> Iterator[str]:
    """The lines of stdin, without their ends."""
    source = _stdin()
    number = 0
    while line := source.readline(MAX_FILE_BYTES + 1):
        number += 1
        yield _text(line, f"stdin line {number}").removesuffix("\n").removesuffix("\r")


def _stdin() -> BinaryIO:
    return sys.stdin.buffer


def _text(data: bytes, where: str) -> str:
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(f"{where} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise RequestError(f"{where} is not UTF-8 text: wrong byte at {err.start}") from None


class Prompter:
    """Reads what a person types, with editing and history where Python has readline.
    ``commands``: what a line that begins with / may be completed to."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = sorted(commands)
        self._readline = _readline()
        if self._readline is not None:
            self._readline.set_completer_delims(" \t\n")
            self._readline.set_completer(self._complete)
            self._readline.parse_and_bind("tab: complete")

    def read(self) -> str:
        """One message or command. Raises ``EOFError`` at the end, ``KeyboardInterrupt`` after
        Ctrl-C."""
        line = _line("> ")
        if not line.startswith(FENCE):
            return line
        lines = [line[len(FENCE) :]]
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(_line("... "))
        lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
        return "\n".join(lines).strip("\n")

    def _complete(self, text: str, state: int) -> str | None:
        assert self._readline is not None
        begins = self._readline.get_begidx() == 0
        return [*candidates(text, self._commands, begins), None][state]


def candidates(text: str, commands: Sequence[str], begins: bool) -> list[str | None]:
    """What ``text`` may be completed to: a command and a blank where it ``begins`` the line, else a
    file."""
    if begins:
        return [f"{name} " for name in commands if name.startswith(text)]
    found = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
    return [path + "/" if os.path.isdir(path) else path for path in found]


def _line(prompt: str) -> str:
    """One line; half a character of a broken terminal becomes a mark."""
    if sys.stdout.isatty():
        line = input(prompt)
    else:  # answers go elsewhere, and the prompt must not go with them
        with contextlib.suppress(OSError):
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        line = line.removesuffix("\n")
    return line.encode("utf-8", "replace").decode("utf-8")


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline
