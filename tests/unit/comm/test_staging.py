"""CUDA tensors over a carrier of CPU tensors: what is copied when. Emulated: the device's queue is
a list of copies that has to be run by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from ds_cp.comm.pending import Pending
from ds_cp.comm.staging import Host, Staged
from ds_cp.comm.transport import Message
from ds_cp.errors import CommError


class Device(Host):
    """A stream whose work is done only when something waits for it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.buffers: list[torch.Tensor] = []

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        self.buffers.append(torch.full_like(like, -1))
        return self.buffers[-1]

    def down(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        copies = [self.buffer(tensor) for tensor in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            self.queue.append(lambda c=copy, t=tensor: c.copy_(t))  # type: ignore[misc]
        if tensors:
            self.synchronize()
        return copies

    def up(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for host, device in pairs:
            self.queue.append(lambda h=host, d=device: d.copy_(h))  # type: ignore[misc]

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class Carrier:
    """Takes CPU tensors and answers what it is told to."""

    def __init__(self, arriving: Sequence[torch.Tensor] = (), fails: bool = False) -> None:
        self.sent: list[tuple[int, torch.Tensor]] = []
        self._arriving = list(arriving)
        self._fails = fails
        self.closed = 0

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], what: str) -> Pending:
        self.sent += [(peer, tensor.clone()) for peer, tensor in sends]

        def finish() -> None:
            if self._fails:
                raise CommError(what)
            for (_, buffer), tensor in zip(recvs, self._arriving, strict=True):
                buffer.copy_(tensor)

        return Pending(finish, what)

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None:
        tensor *= 3

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        tensor.fill_(8)

    def close(self) -> None:
        self.closed += 1


def test_what_is_sent_is_what_the_stream_has_computed_by_then() -> None:
    device, carrier = Device(), Carrier([torch.arange(3.0)])
    mine, coming = torch.zeros(2, dtype=torch.int64), torch.zeros(3)
    device.queue.append(lambda: mine.fill_(7))  # a kernel that was launched before
    pending = Staged(carrier, device).exchange([(1, mine)], [(2, coming)], "x")
    device.queue.append(lambda: mine.fill_(9))  # one after: the copy is not touched by it
    [(peer, sent)] = carrier.sent
    assert peer == 1 and sent.tolist() == [7, 7] and sent.dtype == torch.int64
    assert coming.tolist() == [0, 0, 0]
    pending.wait()
    device.queue.append(lambda: coming.mul_(2))  # a kernel after the wait sees what arrived
    device.synchronize()
    assert coming.tolist() == [0, 2, 4]
    with pytest.raises(RuntimeError, match="waited for twice"):
        pending.wait()


def test_sums_and_broadcasts_go_down_and_up() -> None:
    device, carrier = Device(), Carrier()
    x = torch.ones(4)
    staged = Staged(carrier, device)
    device.queue.append(lambda: x.add_(1))
    staged.all_reduce(x, "sum")
    device.queue.append(lambda: x.add_(1))
    device.synchronize()
    assert x.tolist() == [7.0] * 4
    staged.broadcast(x, "plan")
    device.synchronize()
    assert x.tolist() == [8.0] * 4
    staged.close()
    assert carrier.closed == 0  # its owner closes it


def test_a_lost_peer_is_the_carriers_error() -> None:
    pending = Staged(Carrier(fails=True), Device()).exchange([(1, torch.ones(1))], [], "hello")
    with pytest.raises(CommError, match="hello"):
        pending.wait()


@pytest.mark.gpu
def test_pinned_copies_on_a_device() -> None:
    """The same on a CUDA device: ``pytest -m gpu tests/unit/comm``."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; run `pytest -m gpu tests/unit/comm` where there is one")
    carrier = Carrier([torch.arange(1000.0)])
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    x.mul_(5)
    staged = Staged(carrier)
    pending = staged.exchange([(1, x)], [(1, y)], "x")
    x.zero_()
    assert carrier.sent[0][1].eq(5).all()
    pending.wait()
    assert torch.equal(y.add_(1).cpu(), torch.arange(1000.0) + 1)
    assert staged._host.buffer(x).is_pinned()
