"""An exchange that was started, and the error when a peer does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from ds_cp.comm.ledger import Waits
from ds_cp.errors import CommError


def lost_peer(what: str, began: float, timeout_s: float, err: Exception) -> CommError:
    """The error for ``what``, an exchange that began at that ``time.monotonic()`` and that a peer
    did not answer."""
    cause = (str(err).splitlines() or [type(err).__name__])[0][:200]
    if time.monotonic() - began < 0.9 * timeout_s:  # gloo counts from a moment before
        return gone_peer(what, began, cause)
    return silent_peer(what, timeout_s, cause)


def gone_peer(what: str, began: float, cause: str) -> CommError:
    """The error when a peer's process or connection has ended."""
    waited = time.monotonic() - began
    return CommError(
        f"{what}: a peer is gone, noticed {waited:.1f} s after the exchange began ({cause}); "
        "see the other ranks' logs"
    )


def silent_peer(what: str, timeout_s: float, cause: str) -> CommError:
    """The error when a peer is there and says nothing for as long as it may."""
    return CommError(
        f"{what}: a peer was silent for {timeout_s:g} s ({cause}); "
        "see the other ranks' logs, or raise comm.timeout_s"
    )


class Pending:
    """An exchange that was started. Wait for it exactly once.

    ``finish`` blocks until every message has arrived, and raises ``CommError``; None when nothing
    is left to be done. ``hurry``: see ``before_work``; whether it did what ``finish`` does. None
    where messages move by themselves.
    """

    __slots__ = ("_finish", "_hurry", "_waited", "_what", "waits")

    def __init__(
        self, finish: Callable[[], None] | None, what: str, hurry: Callable[[], bool] | None = None
    ) -> None:
        self._finish = finish
        self._hurry = hurry
        self._what = what
        self._waited = False
        self.waits: Waits | None = None  # what the time of ``wait`` is added to

    def before_work(self) -> None:
        """Called by who is about to compute for long before ``wait``. Where messages move only
        within this rank's calls and a peer has not taken all of them yet, it would have to wait
        until the work is done: then they are sent now. Raises ``CommError``."""
        hurry, self._hurry = self._hurry, None
        if hurry is not None:
            began = time.perf_counter()
            if hurry():
                self._finish = None
            if self.waits is not None:
                self.waits.seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Block until every message has arrived. ``CommError`` after the job's time limit;
        ``RuntimeError``, a fault of ds_cp, the second time."""
        if self._waited:
            raise RuntimeError(f"{self._what}: waited for twice")
        self._waited = True
        finish, self._finish = self._finish, None
        if finish is None:
            return
        if self.waits is None:
            finish()
            return
        began = time.perf_counter()
        finish()
        self.waits.seconds += time.perf_counter() - began
