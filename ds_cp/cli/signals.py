"""Signals of commands that hold a terminal, or run an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def caught(
    on_signal: Callable[[int], None],
    numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> Iterator[None]:
    """Inside the block, these signals call ``on_signal`` in the running loop."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number] or signal.SIG_DFL)


class CtrlC:
    """Ctrl-C of a command that waits in an event loop and, between two looks of it, in writes that
    block for as long as nobody reads."""

    def __init__(self) -> None:
        self._came = False
        self._breaks = False  # by KeyboardInterrupt

    @contextlib.contextmanager
    def caught(self, on_signal: Callable[[], object]) -> Iterator[None]:
        """Inside the block Ctrl-C calls ``on_signal`` in the running loop, but where it breaks what
        is done."""
        loop = asyncio.get_running_loop()

        def take(number: int, _: object) -> None:
            self._came = True
            loop.call_soon_threadsafe(on_signal)
            if self._breaks:
                self._breaks = False
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, take)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)

    @contextlib.contextmanager
    def breaking(self) -> Iterator[None]:
        """Inside the block Ctrl-C, also one that the loop has not heard of yet, raises
        ``KeyboardInterrupt``."""
        self._breaks = True
        try:
            if self._came:
                raise KeyboardInterrupt
            yield
        finally:
            self._breaks = False


@contextlib.contextmanager
def terminal_given_back() -> Iterator[None]:
    """Inside the block SIGTERM raises ``SystemExit`` 143, so that whoever holds the terminal, an
    editor of lines or a screen of its own, gives it back on the way."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
