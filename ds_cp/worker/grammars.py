"""The grammars of the requests that this rank draws for, and which tokens they allow next.

States follow the tokens as penalties do (``history``): a request that comes from another rank, or
starts again after it was preempted, has its state made again from its output. The work is done in a
thread beside the model's forward call, which waits for neither tokens nor masks.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from typing import NamedTuple

from ds_cp.grammar.limits import RANK_STACK_BYTES
from ds_cp.grammar.matcher import Compiler, GrammarError, Matcher
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.text import shorten
from ds_cp.worker.state import Draw

MASKS_S = 30.0  # seconds for the masks of one step; each is bounded to some 20 ms by the library


class _Wish(NamedTuple):
    request: int
    source: str
    tokens: tuple[int, ...]  # that came since its last mask here
    ends: frozenset[int]


class Grammars:
    """States by request. ``start`` and ``masks`` are called in turns.

    ``wait_s``: seconds that a step waits for its masks, well below what other ranks wait for it.
    """

    def __init__(self, wait_s: float = MASKS_S) -> None:
        self._wait_s = wait_s
        self._thread: ThreadPoolExecutor | None = None
        self._compiler: Future[Compiler] | None = None
        self._num_told: dict[int, int] = {}  # output tokens that a request's state has
        self._matchers: dict[int, Matcher | None] = {}  # None: it failed. Of the thread alone
        self._coming: Future[dict[int, bytes]] | None = None
        self._late: Future[dict[int, bytes]] | None = None  # masks that no step waits for any more

    def learn(self, vocabulary: Vocabulary) -> None:
        """What tokens spell; before the first request with a grammar draws. Said again, it is what
        it was."""
        if self._compiler is not None:
            return
        before = threading.stack_size(RANK_STACK_BYTES)
        try:
            self._thread = ThreadPoolExecutor(1, "ds_cp grammars")
            self._compiler = self._thread.submit(Compiler, vocabulary)  # starts the thread
        finally:
            threading.stack_size(before)
        self._matchers, self._num_told = {}, {}

    def forget(self, requests: Iterable[int]) -> None:
        """Requests that ended here, or begin again."""
        gone = [request for request in requests if self._num_told.pop(request, None) is not None]
        if gone and self._thread is not None:
            self._thread.submit(self._drop, gone)

    def clear(self) -> None:
        """Forget all requests."""
        self.forget(list(self._num_told))

    def start(self, draws: Sequence[Draw]) -> None:
        """Begin to make the masks of this rank's draws, once it knows all tokens before them."""
        wishes = [self._wish(draw) for draw in draws if draw.sequence.sampling.grammar]
        self._coming = None
        if self._late is not None and self._late.done():
            self._late = None
        if wishes and self._thread is not None and self._late is None:
            self._coming = self._thread.submit(self._make, wishes)

    def masks(self) -> dict[int, bytes]:
        """By request, the tokens that may come next, as ``Row.allowed``. A request whose grammar
        failed is not in it; why goes to stderr. None is in it after ``wait_s``, nor in the steps
        until the late masks are made: their requests fail, and others go on."""
        coming, self._coming = self._coming, None
        if coming is None:
            return {}
        try:
            return coming.result(self._wait_s)
        except NotInTime:  # those of the next steps would wait behind them
            self._late = coming
            print(f"ds_cp: error: no masks of grammars within {self._wait_s:g} s", file=sys.stderr)
            return {}

    def _wish(self, draw: Draw) -> _Wish:
        sequence = draw.sequence
        told = self._num_told.get(sequence.number, 0)
        tokens = list(sequence.outputs[told : draw.index])
        if told + len(tokens) < draw.index:  # drawn in the step before, and not announced yet
            tokens.append(sequence.last)
        self._num_told[sequence.number] = draw.index
        sampling = sequence.sampling
        return _Wish(sequence.number, sampling.grammar, tuple(tokens), frozenset(sampling.ends))

    # --- in the thread

    def _make(self, wishes: Sequence[_Wish]) -> dict[int, bytes]:
        found = {}
        for wish in wishes:
            try:
                found[wish.request] = self._mask(wish)
            # Whatever a grammar does concerns its request alone; a panic of the library is no
            # Exception.
            except BaseException as err:
                if self._matchers.get(wish.request, wish) is not None:
                    reason = str(err) if isinstance(err, GrammarError) else shorten(repr(err), 200)
                    print(
                        f"ds_cp: error: request {wish.request}: its grammar failed: {reason}",
                        file=sys.stderr,
                    )
                self._matchers[wish.request] = None
        return found

    def _mask(self, wish: _Wish) -> bytes:
        if wish.request not in self._matchers:
            assert self._compiler is not None, "no vocabulary came"
            self._matchers[wish.request] = self._compiler.result().compile(wish.source)
        matcher = self._matchers[wish.request]
        if matcher is None:
            raise GrammarError("it failed before")
        if any(token < 0 for token in wish.tokens):
            raise GrammarError("a token could not be drawn")
        matcher.advance(wish.tokens, wish.ends)
        return matcher.allowed(wish.ends)

    def _drop(self, requests: Sequence[int]) -> None:
        for request in requests:
            self._matchers.pop(request, None)
