"""An exchange that was started, and the error when a peer does not answer."""

from __future__ import annotations

import time
from typing import Any

from ds_cp.errors import CommError


def lost_peer(what: str, began: float, timeout_s: float, err: RuntimeError) -> CommError:
    """The error for ``what``, an exchange that began at that ``time.monotonic()`` and that a peer
    did not answer."""
    cause = (str(err).splitlines() or [type(err).__name__])[0][:200]
    waited = time.monotonic() - began
    if waited < 0.9 * timeout_s:  # gloo counts from a moment before
        return CommError(
            f"{what}: a peer is gone, noticed {waited:.1f} s after the exchange began ({cause}); "
            "see the other ranks' logs"
        )
    return CommError(
        f"{what}: a peer was silent for {timeout_s:g} s ({cause}); "
        "see the other ranks' logs, or raise comm.timeout_s"
    )


class Pending:
    """An exchange that was started. Wait for it exactly once."""

    def __init__(self, works: list[Any], what: str, timeout_s: float) -> None:
        self._works: list[Any] | None = works
        self._what = what
        self._began = time.monotonic()
        self._timeout_s = timeout_s

    def wait(self) -> None:
        """Block until every message has arrived. ``CommError`` after the job's time limit;
        ``RuntimeError``, a fault of ds_cp, the second time."""
        if self._works is None:
            raise RuntimeError(f"{self._what}: waited for twice")
        works, self._works = self._works, None
        try:
            for work in works:
                work.wait()
        except RuntimeError as err:
            raise lost_peer(self._what, self._began, self._timeout_s, err) from err
