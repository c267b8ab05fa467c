"""A transport that records what goes through it; put in place of a group's own while a trace is
taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ds_cp.comm.pending import Pending
from ds_cp.comm.transport import Message, Preparing, Transport
from ds_cp.trace.recorder import Kind, Recorder


class TracedTransport:
    """Carries what ``inner`` carries. See ``Transport``. ``rank``, ``size``: of the group."""

    def __init__(self, inner: Transport, recorder: Recorder, rank: int, size: int) -> None:
        self._inner = inner
        self._recorder = recorder
        self._rank = rank
        self._size = size

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], what: str) -> Pending:
        """As ``inner``; a span for its start and one for the wait."""
        return self._traced(lambda: self._inner.exchange(sends, recvs, what), sends, recvs, what)()

    def prepare(
        self, sends: Sequence[Message], recvs: Sequence[Message], what: str
    ) -> Callable[[], Pending]:
        """As ``inner``, where that can prepare."""
        inner = self._inner
        if isinstance(inner, Preparing):
            return self._traced(inner.prepare(sends, recvs, what), sends, recvs, what)
        return self._traced(lambda: inner.exchange(sends, recvs, what), sends, recvs, what)

    def _traced(
        self, begin: Callable[[], Pending], sends: Sequence[Message], recvs: Sequence[Message],
        what: str,
    ) -> Callable[[], Pending]:  # fmt: skip
        recorder = self._recorder
        nbytes = sum(tensor.nbytes for _, tensor in sends)
        name = f"{_scheme(what)} to {_listed(sends)} from {_listed(recvs)}"

        def start() -> Pending:
            number = recorder.next_exchange()
            began = recorder.now
            inner = begin()
            recorder.add(Kind.POST, name, began, nbytes, number)

            def finish() -> None:
                began = recorder.now
                inner.wait()
                recorder.add(Kind.WAIT, name, began, 0, number)

            def hurry() -> bool:
                inner.before_work()
                return False

            return Pending(finish, what, hurry)

        return start

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None:
        """As ``inner``; the bytes as the ledger counts them."""
        nbytes = 2 * (self._size - 1) * tensor.nbytes // self._size
        began = self._recorder.now
        self._inner.all_reduce(tensor, what)
        self._recorder.add(Kind.SUM, _scheme(what), began, nbytes)

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """As ``inner``; the bytes as the ledger counts them."""
        nbytes = (self._size - 1) * tensor.nbytes if self._rank == 0 else 0
        began = self._recorder.now
        self._inner.broadcast(tensor, what)
        self._recorder.add(Kind.SUM, _scheme(what), began, nbytes)

    def close(self) -> None:
        """As ``inner``."""
        self._inner.close()


def _scheme(what: str) -> str:
    """The name in the ledger, which messages begin with."""
    return what.partition(" ")[0]


def _listed(messages: Sequence[Message]) -> str:
    return ",".join(str(peer) for peer in sorted({peer for peer, _ in messages})) or "none"
