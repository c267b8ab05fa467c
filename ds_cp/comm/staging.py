"""Tensors of a CUDA device over a carrier that takes CPU tensors, by way of pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.comm.pending import Pending
from ds_cp.comm.transport import Message, Transport


class Host:
    """Copies between a device and the host's memory, in the order of the current stream."""

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory, of that shape and dtype."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def down(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies on the host, which are complete: what was queued on the device before is done."""
        copies = []
        for tensor in tensors:
            copy = self.buffer(tensor)
            copy.copy_(tensor, non_blocking=True)
            copies.append(copy)
        if tensors:
            torch.cuda.current_stream(tensors[0].device).synchronize()
        return copies

    def up(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Queue a copy of each (host, device) pair to the device. The host's memory may be dropped
        at once: its allocator gives it out again when the stream has read it."""
        for host, device in pairs:
            device.copy_(host, non_blocking=True)


class Staged:
    """Carries a device's tensors through ``inner``, by copies. See ``Transport``.

    What is sent is copied when the exchange starts, after the work that was queued before; what
    arrives is on the device's stream when the exchange was waited for.
    """

    def __init__(self, inner: Transport, host: Host | None = None) -> None:
        self._inner = inner
        self._host = host or Host()

    def exchange(self, sends: Sequence[Message], recvs: Sequence[Message], what: str) -> Pending:
        """As ``inner``, with copies before and after."""
        copies = self._host.down([tensor for _, tensor in sends])
        going = [(peer, copy) for (peer, _), copy in zip(sends, copies, strict=True)]
        coming = [(peer, self._host.buffer(tensor)) for peer, tensor in recvs]
        inner = self._inner.exchange(going, coming, what)
        arriving = [(copy, t) for (_, copy), (_, t) in zip(coming, recvs, strict=True)]

        def finish() -> None:
            inner.wait()
            self._host.up(arriving)

        def hurry() -> bool:
            inner.before_work()
            return False

        return Pending(finish, what, hurry)

    def all_reduce(self, tensor: torch.Tensor, what: str) -> None:
        """As ``inner``, on a copy."""
        [copy] = self._host.down([tensor])
        self._inner.all_reduce(copy, what)
        self._host.up([(copy, tensor)])

    def broadcast(self, tensor: torch.Tensor, what: str) -> None:
        """As ``inner``, on a copy."""
        [copy] = self._host.down([tensor])
        self._inner.broadcast(copy, what)
        self._host.up([(copy, tensor)])

    def close(self) -> None:
        """Nothing: ``inner`` is closed by who owns it."""
