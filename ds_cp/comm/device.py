"""Wait for a CUDA device with a deadline: a kernel that waits for a dead peer never ends.

NCCL's ``wait`` orders streams and returns; a peer's death shows as a kernel that goes on for ever.
So whoever is about to need the device's results waits here first, and looks after the peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from ds_cp.comm.pending import gone_peer, silent_peer

SPIN_S = 500e-6  # of looking without a pause
PAUSE_S = 50e-6  # between looks afterwards; it grows to MAX_PAUSE_S
MAX_PAUSE_S = 1e-3
PEERS_S = 0.2  # between looks after the peers


class Mark(Protocol):
    """A place in a device's queue, as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the device has come so far."""


def wait_until(
    mark: Mark,
    timeout_s: float,
    lost: Callable[[], str],
    what: str = "the step's work on the device",
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Block until the device has come to ``mark``. ``lost`` says who is gone, "" for nobody.

    Raises ``CommError`` when somebody is gone, or after ``timeout_s``.
    """
    began = now()
    looked, pause = began, PAUSE_S
    while not mark.query():
        at = now()
        if at - began < SPIN_S:
            continue
        if at - looked >= PEERS_S:
            looked = at
            if (who := lost()) and not mark.query():
                raise gone_peer(what, began, who)
        if at - began >= timeout_s:
            raise silent_peer(what, timeout_s, "the device did not come to an end")
        sleep(pause)
        pause = min(1.5 * pause, MAX_PAUSE_S)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued on it; on CPU nothing is. For work that
    waits for no peer."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark_here(device: torch.device) -> Mark:
    """A mark at the end of what is queued on the current stream."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
