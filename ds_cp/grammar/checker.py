"""Rank 0's check of a grammar before anything runs: compiled once in a process that can be killed.

A grammar is a program of the client's: it may be no grammar, or take any time and memory to
compile. The library bounds both with units of its own; a process of its own, under limits that the
kernel keeps, bounds them whatever the library does. Every rank that draws under the grammar then
compiles the same text, which is known to take little.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ds_cp.errors import GrammarBusyError, RequestError
from ds_cp.frames import frame, receive
from ds_cp.grammar.constraint import FIELD, StructuredOutputsParams
from ds_cp.grammar.limits import COMPILE_BYTES, COMPILE_CPU_S, KEPT_CHECK_BYTES
from ds_cp.grammar.messages import Answer, Compiled, Failed, First, Job, Known, Tokens, Unable
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.sandbox import start_beside

WALL_S = 10.0  # seconds by the clock for one grammar, the wait for others included
START_S = 60.0  # seconds by the clock for the process to start and read the tokenizer
AT_ONCE = 2  # grammars that are compiled at the same time


@dataclass(frozen=True)
class Refused:
    """A grammar that was not accepted."""

    reason: str


class GrammarChecker:
    """Checks grammars for one tokenizer. May be called from several threads.

    Its process starts with the first grammar, and again when it is gone. It ends when this process
    ends, however that happens: its end of a socket is closed then.
    """

    def __init__(
        self, tokenizer: Any, cpu_s: float = COMPILE_CPU_S, memory_bytes: int = COMPILE_BYTES
    ) -> None:
        self._tokenizer = tokenizer
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()  # of the process
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False
        self._vocabulary: Vocabulary | None = None
        self._known: OrderedDict[tuple[str, bool], str | Refused] = OrderedDict()
        self._known_bytes = 0
        self._knowing = threading.Lock()  # of both

    @property
    def vocabulary(self) -> Vocabulary:
        """What each token spells; known once a grammar was accepted."""
        assert self._vocabulary is not None, "no grammar was checked"
        return self._vocabulary

    def check(self, params: StructuredOutputsParams, timeout_s: float = WALL_S) -> str:
        """The text of the grammar as ranks compile it. Blocks up to ``timeout_s``.

        Raises ``RequestError`` when it is none, cannot be kept exactly or takes more than the
        bounds, or the tokenizer does not say what its tokens spell; ``GrammarBusyError`` when other
        grammars take all the time.
        """
        known = self.recall(params)
        if known is not None:
            return known
        try:
            found = self._compile(params, time.monotonic() + timeout_s)
        except RequestError as err:
            name = params.asked_as
            raise RequestError(str(err).replace(FIELD, name), name) from err
        self._remember((params.source, params.is_foreign), found)
        return _or_raise(found, params)

    def recall(self, params: StructuredOutputsParams) -> str | None:
        """``check`` of one that was checked lately; None for another. Returns at once."""
        key = params.source, params.is_foreign
        with self._knowing:
            found = self._known.get(key)
            if found is None:
                return None
            self._known.move_to_end(key)
        return _or_raise(found, params)

    def _remember(self, key: tuple[str, bool], found: str | Refused) -> None:
        with self._knowing:
            if key in self._known:
                return
            self._known[key] = found
            self._known_bytes += _size(key, found)
            while self._known_bytes > KEPT_CHECK_BYTES:
                self._known_bytes -= _size(*self._known.popitem(last=False))

    def _compile(self, params: StructuredOutputsParams, deadline: float) -> str | Refused:
        if not self._slots.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise _busy(params.asked_as)
        try:
            with self._knowing:  # another caller may have asked for the same one meanwhile
                known = self._known.get((params.source, params.is_foreign))
            if known is not None:
                return known
            wall_s = max(deadline - time.monotonic(), 0.1)
            job = Job(params.source, params.is_foreign, self._cpu_s, wall_s, self._memory_bytes)
            answer = self._ask(job)
        finally:
            self._slots.release()
        if isinstance(answer, Compiled):
            return answer.source if params.is_foreign else params.source  # one copy, not two
        if isinstance(answer, Failed):
            return Refused(answer.reason)
        if isinstance(answer, Unable):
            raise _unavailable(answer.reason)
        if time.monotonic() >= deadline:
            raise _busy(params.asked_as)
        if not self._lives():
            raise _unavailable("its process has ended")
        return Refused(
            f"this grammar does not compile within {self._cpu_s:g} s of computing and "
            f"{self._memory_bytes >> 20} MiB of memory; make it smaller"
        )

    def _ask(self, job: Job) -> Answer | None:
        """A child's answer; None when it ended without one."""
        with self._lock:
            control = self._started()
            ours, theirs = socket.socketpair()
            try:
                socket.send_fds(control, [b"j"], [theirs.fileno()])
            except OSError as err:
                ours.close()
                self._drop()
                raise _unavailable(f"its process has ended ({err.strerror})") from err
            finally:
                theirs.close()
        with ours:
            try:
                ours.settimeout(job.wall_s)
                ours.sendall(frame(job))
                answer: Answer | None = receive(ours, Answer, time.monotonic() + job.wall_s)
            except (OSError, ValueError):  # its end by a signal resets the connection
                answer = None
        return answer

    def _lives(self) -> bool:
        with self._lock:
            return self._process is not None and self._process.poll() is None

    # --- the process; the lock is held

    def _started(self) -> socket.socket:
        if self._closed:
            raise _unavailable("it has been ended")
        if self._process is not None and self._process.poll() is not None:
            self._drop()
        if self._control is None:
            self._start()
        assert self._control is not None
        return self._control

    def _start(self) -> None:
        try:
            tokens = Tokens(tokenizer_json(self._tokenizer))
        except ValueError as err:
            raise _unavailable(str(err)) from err
        try:
            self._process, self._control = start_beside("ds_cp.grammar.compile_process")
        except OSError as err:
            raise _unavailable(f"its process cannot start ({err.strerror})") from err
        if self._closed:  # meanwhile; ``close`` may have seen no process to end
            self._drop()
            raise _unavailable("it has been ended")
        try:
            self._control.settimeout(START_S)
            self._control.sendall(frame(tokens))
            deadline = time.monotonic() + START_S
            first: First | None = receive(self._control, First, deadline)
        except (OSError, ValueError) as err:
            self._drop()
            raise _unavailable(f"its process does not answer ({err})") from err
        if not isinstance(first, Known):
            self._drop()
            raise _unavailable(first.reason if first else "its process has ended")
        self._vocabulary = first.vocabulary

    def _drop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control, self._process = None, None

    def close(self) -> None:
        """End the process, at once. Checks that run raise ``RequestError``."""
        self._closed = True
        process = self._process  # its start holds the lock, and ends with it
        if process is not None:
            process.kill()
        with self._lock:
            self._drop()

    @property
    def pid(self) -> int | None:
        """The process id while it is kept; its children compile."""
        return None if self._process is None else self._process.pid


def _size(key: tuple[str, bool], found: str | Refused) -> int:
    """Bytes that a remembered check takes, about: characters, and what holds them."""
    text = found.reason if isinstance(found, Refused) else found
    return len(key[0]) + (0 if text is key[0] else len(text)) + 256


def _or_raise(found: str | Refused, params: StructuredOutputsParams) -> str:
    if isinstance(found, Refused):
        raise RequestError(f"{params.asked_as}: {found.reason}", params.asked_as)
    return found


def tokenizer_json(tokenizer: Any) -> str:
    """A transformers tokenizer as the text of its ``tokenizer.json``. Raises ``ValueError`` for one
    that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        kind = "none" if tokenizer is None else type(tokenizer).__name__
        raise ValueError(f"it needs a fast tokenizer; this engine has {kind}")
    text: str = backend.to_str()
    return text


def _busy(field: str) -> GrammarBusyError:
    return GrammarBusyError(
        f"{field}: other grammars are being compiled, {AT_ONCE} at a time; try again"
    )


def _unavailable(reason: str) -> RequestError:
    return RequestError(f"{FIELD} is not available: {reason}", FIELD)
