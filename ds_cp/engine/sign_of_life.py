"""Idle plans while the caller of ``stream`` is busy elsewhere, so that no rank reads silence as the
end of rank 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ds_cp.plan import Idle, Outcome, Plan

IDLE_S = 20.0  # seconds without a plan after which the other ranks get an idle one, at most


def idle_seconds(timeout_s: float) -> float:
    """Seconds between plans at most, so that no rank waits ``comm.timeout_s`` for one."""
    return min(timeout_s / 3, IDLE_S)


class SignOfLife:
    """Runs the caller's plans, and an ``Idle`` one when ``every_s`` seconds passed without a plan
    while the caller is ``away``. A thread does that, only within ``away``, so that never two
    threads of this process talk to the other ranks. ``every_s`` None: there are no other ranks."""

    def __init__(self, lead: Callable[[Plan], Outcome], every_s: float | None) -> None:
        self._lead = lead
        self._every_s = every_s
        self._last = time.monotonic()
        self._changed = threading.Condition()
        self._is_away = False
        self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def lead(self, plan: Plan) -> Outcome:
        """Run a plan in the caller's thread."""
        outcome = self._lead(plan)
        self._last = time.monotonic()
        return outcome

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around code that is not ours. At its end an idle plan under way is waited for; one that
        failed raises its error here."""
        if self._every_s is None:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ds_cp idle", daemon=True)
            self._thread.start()
        with self._changed:
            self._is_away = True
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._is_away = False
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._every_s is not None
        with self._changed:
            while not self._closed:
                left = self._last + self._every_s - time.monotonic()
                if not self._is_away:
                    self._changed.wait()
                elif left > 0:
                    self._changed.wait(left)
                else:
                    try:
                        self.lead(Idle())
                    except BaseException as err:
                        self._failure = err
                        return
