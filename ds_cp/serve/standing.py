"""How rank 0's engine stands: what /health says of it, and whether it takes a request."""

from __future__ import annotations

from collections.abc import Callable

from ds_cp.errors import EngineDeadError, StoppingError


class Standing:
    """Flags that the engine's thread and the event loop set, and any thread reads. ``is_mending``:
    whether ranks are about to meet again, which the engine learns when it next asks them."""

    def __init__(self, is_mending: Callable[[], bool], stall_s: float) -> None:
        self._is_mending = is_mending
        self._stall_s = stall_s
        self.is_loaded = False
        self.is_dead = False
        self.is_interrupted = False  # the engine waits for the ranks to meet again
        self.is_refusing = False  # new requests, because the server is being stopped
        self.is_cut = False  # unfinished requests were told that it stops
        self.has_failed = False  # by ``AsyncEngine.fail``

    def state(self, step_age_s: float) -> str:
        """As ``EngineInterface`` says. ``step_age_s``: of the step that runs now."""
        if self.is_refusing and not self.has_failed:
            return "stopping"
        if self.is_dead:
            return "dead"
        if not self.is_loaded:
            return "starting"
        if self.is_interrupted or self._is_mending():
            return "recovering"
        return "stalled" if step_age_s > self._stall_s else "ready"

    def check(self) -> None:
        """Raise ``EngineDeadError`` (``StoppingError``) unless new requests are taken: also while
        ranks meet again, or a step takes long."""
        if self.is_refusing and not self.has_failed:
            raise StoppingError("the server is stopping")
        if self.is_dead or not self.is_loaded:
            raise EngineDeadError(f"the engine is {self.state(0.0)}")
