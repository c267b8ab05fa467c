"""Times the steps that a worker runs: their seconds in all, and how long the oldest one takes."""

from __future__ import annotations

import time

from ds_cp.plan import Outcome, Plan
from ds_cp.serve.worker_link import WorkerLink


class TimedLink:
    """A ``WorkerLink`` that times its plans. One thread submits and takes outcomes; ``seconds``, of
    all steps so far as the ranks measured them, and ``age_s`` may be read by any."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link
        self._outstanding = 0  # plans without an outcome
        self._since: float | None = None  # the oldest of them runs, in time.monotonic()
        self.seconds = 0.0

    @property
    def age_s(self) -> float:
        """Seconds that the oldest plan without an outcome has been running; 0 without one."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, plan: Plan) -> None:
        """Hand over a plan."""
        if not self._outstanding:
            self._since = time.monotonic()
        self._outstanding += 1
        self._link.submit(plan)

    def forget(self) -> None:
        """The plans without an outcome will have none."""
        self._outstanding, self._since = 0, None

    def outcome(self) -> Outcome:
        """The oldest plan's outcome."""
        outcome = self._link.outcome()
        self._outstanding -= 1
        self._since = time.monotonic() if self._outstanding else None
        self.seconds += outcome.seconds
        return outcome
