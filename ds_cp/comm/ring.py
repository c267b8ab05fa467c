"""One hop of a ring: send the buffer in hand to the next member, receive the previous one's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.comm.pending import Pending
from ds_cp.comm.wire import Group


class RingExchange:
    """Moves buffers around ``members`` (group indices in ring order; this rank is among them).

    ``post`` starts a hop and ``wait`` ends it; a second post before the wait, or a wait without a
    post, is a ``RuntimeError``. A ring without this rank is a ``ValueError``. Ring
    shape after the double buffering of ring attention (arXiv 2310.01889).
    """

    def __init__(self, group: Group, members: Sequence[int], scheme: str) -> None:
        if group.rank not in members:
            raise ValueError(f"rank {group.rank} is not in the ring {list(members)}")
        self._group = group
        self._scheme = scheme
        self.size = len(members)
        self.place = list(members).index(group.rank)
        self.next = members[(self.place + 1) % self.size]
        self.prev = members[(self.place - 1) % self.size]
        self._pending: Pending | None = None
        self._arriving: torch.Tensor | None = None

    def origin(self, step: int) -> int:
        """Position in ``members`` of the rank whose buffer is here after ``step`` hops."""
        return (self.place - step) % self.size

    def post(self, send: torch.Tensor, recv: torch.Tensor) -> None:
        """Start sending ``send`` to the next member and receiving ``recv`` from the previous one.

        Both must stay untouched until ``wait``. The caller computes before that.
        """
        if self._pending is not None:
            raise RuntimeError("ring: post before the last hop was waited for")
        self._pending = self._group.exchange([(self.next, send)], [(self.prev, recv)], self._scheme)
        self._pending.before_work()
        self._arriving = recv

    def wait(self) -> torch.Tensor:
        """Block until the hop is done and return the received buffer."""
        if self._pending is None or self._arriving is None:
            raise RuntimeError("ring: wait without a post")
        self._pending.wait()
        arrived = self._arriving
        self._pending = self._arriving = None
        return arrived
