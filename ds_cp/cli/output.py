"""stdout and stderr of the command line: results arrive whole, or an error says that they do not.

Results (``generate``, ``batch``) are UTF-8 whatever the locale; what UTF-8 has no bytes for, a lone
surrogate, is written as its escape (``\\udc80``). Reports for people (``config``, ``doctor``,
``version``) have the encoding of Python's stdout, with escapes for what it lacks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from ds_cp.errors import OutputError


def prepare_streams() -> bool:
    """Make stdin, stdout and stderr usable; returns whether stdout was open.

    A closed one (``>&-``) leads to the null device from here on: else the next file that is opened
    would take its number, and be written to. Text that stdout cannot encode is escaped.
    """
    was_open = [_is_open(fd) for fd in range(3)]
    for fd in range(3):
        if not was_open[fd]:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: ``fd``
            os.set_inheritable(fd, True)  # or the ranks that we start would lack it again
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return was_open[1]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def put(line: str) -> None:
    """Print a line on stdout. ``OutputError`` when it cannot be written."""
    with writing(sys.stdout):
        print(line)


def flush() -> None:
    """Write out what stdout holds. ``OutputError`` when it cannot be written."""
    with writing(sys.stdout):
        sys.stdout.flush()


def put_at_once(text: str) -> None:
    """Write ``text`` to stdout, past its buffer: when Ctrl-C ends that, because nobody reads, no
    rest is left to be written at the exit. ``OutputError`` when it cannot be written."""
    out = sys.stdout
    with writing(out):
        out.flush()
        try:
            number = out.fileno()
        except OSError:  # not a file
            out.write(text)
            out.flush()
            return
        left = memoryview(text.encode(out.encoding, out.errors or "strict"))
        while left:
            left = left[os.write(number, left) :]


def drop_unread() -> None:
    """After Ctrl-C: where stdout takes nothing now, drop what it still holds, so that the exit does
    not wait for a reader."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdout.fileno()
        if not select.select([], [number], [], 0)[1]:
            _lead_nowhere(number)


def _lead_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def say(line: str) -> None:
    """Print a line on stderr, for people. Where stderr cannot be written, the work goes on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def writing(out: TextIO) -> Iterator[None]:
    """Inside the block, failures to write ``out``, which leads to stdout, are ``OutputError``."""
    try:
        yield
    except OSError as err:
        with contextlib.suppress(OSError):  # the rest goes nowhere, or the exit would complain
            _lead_nowhere(out.fileno())
        raise unwritable(err) from None


def unwritable(err: OSError) -> OutputError:
    """The error of a stdout that cannot be written."""
    if err.errno == errno.EPIPE:
        return OutputError("cannot write to stdout: its reader has left before the end")
    reason = err.strerror or err
    return OutputError(f"cannot write to stdout: {reason}; redirect it to where there is room")


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Keep stdout for the results alone: what libraries print there goes to stderr meanwhile.

    Write within ``writing``. The end of the block raises ``OutputError`` when the rest cannot be
    written.
    """
    flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    out = os.fdopen(os.dup(kept), "w", encoding="utf-8", errors="backslashreplace")
    try:
        with redirect_stdout(sys.stderr):
            yield out
            with writing(out):
                out.flush()
    finally:
        with contextlib.suppress(OSError):
            out.close()
        ctypes.CDLL(None).fflush(None)  # C code's own buffer, before the real stdout is back
        os.dup2(kept, 1)
        os.close(kept)
