"""Small messages over all ranks of the job: plans out, results back. On CPU whatever the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.comm.pending import Pending
from ds_cp.comm.wire import Message, World
from ds_cp.errors import CommError
from ds_cp.plan import MAX_PLAN_BYTES

PLAN, RESULT = "plan", "result"


class Control:
    """Rank 0's channel to all ranks. A plan is raw bytes (msgpack), at most ``LIMIT`` long."""

    FRAME = 4096  # one broadcast carries this much, which nearly every plan fits
    LIMIT = MAX_PLAN_BYTES

    def __init__(self, world: World) -> None:
        self._group = world.everybody
        self._frame = torch.zeros(self.FRAME, dtype=torch.uint8)

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0 gives ``payload`` to all ranks; every rank returns it. ``CommError`` when it is
        too long, or when a peer is gone."""
        if self._group.rank == 0:
            assert payload is not None
            self._give(payload)
            return payload
        self._group.broadcast(self._frame, PLAN)
        raw = self._frame.numpy().tobytes()
        size = _checked(int.from_bytes(raw[:8], "little"))
        if size <= self.FRAME - 8:
            return raw[8 : 8 + size]
        rest = torch.empty(size - (self.FRAME - 8), dtype=torch.uint8)
        self._group.broadcast(rest, PLAN)
        return raw[8:] + rest.numpy().tobytes()

    def _give(self, payload: bytes) -> None:
        size = _checked(len(payload))
        if len(self._group.present) == 1:
            return
        head = size.to_bytes(8, "little") + payload[: self.FRAME - 8]
        self._frame[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._group.broadcast(self._frame, PLAN)
        if size > self.FRAME - 8:
            rest = torch.frombuffer(bytearray(payload[self.FRAME - 8 :]), dtype=torch.uint8)
            self._group.broadcast(rest, PLAN)

    def expect(self, others: Sequence[Message]) -> Pending:
        """Rank 0: start to receive into the buffers of ``others``, (rank, buffer) of the ranks that
        ``report``. CPU tensors, contiguous."""
        return self._group.exchange([], others, RESULT)

    def report(self, mine: torch.Tensor) -> None:
        """Another rank: send ``mine`` to rank 0, which expects it."""
        self._group.exchange([(0, mine)], [], RESULT).wait()

    def collect(self, mine: torch.Tensor, others: Sequence[Message]) -> None:
        """Each rank but 0 sends ``mine`` (CPU, contiguous; empty sends nothing) to rank 0, which
        fills the buffers of ``others``: (rank, buffer) of those that send."""
        sends = [] if self._group.rank == 0 else [(0, mine)]
        recvs = others if self._group.rank == 0 else []
        self._group.exchange(sends, recvs, RESULT).wait()


def _checked(size: int) -> int:
    if size > Control.LIMIT:
        raise CommError(f"a plan of {size} bytes is above the limit {Control.LIMIT}")
    return size
