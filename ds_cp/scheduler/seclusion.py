"""Steps of one request alone: of one that may be what ends workers. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ds_cp.scheduler.decode import DecodePlanner
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.prefill import PrefillPlanner
from ds_cp.scheduler.queue import WaitingQueue
from ds_cp.scheduler.request import Request


class Seclusion:
    """``running`` and ``waiting`` are the scheduler's own; ``suspects``: who runs alone."""

    def __init__(
        self,
        suspects: Collection[int],
        running: Sequence[Request],
        waiting: WaitingQueue,
        decode: DecodePlanner,
        prefill: PrefillPlanner,
    ) -> None:
        self._suspects = suspects
        self._running = running
        self._waiting = waiting
        self._decode = decode
        self._prefill = prefill

    def plan(self, draft: Draft, busy: bool) -> bool:
        """Enter the next step of one suspect, unless a step is under way (``busy``); whether the
        step is for nobody else. One that waits for room does so while the others run."""
        if not self._suspects:
            return False
        own = next((r for r in self._running if r.number in self._suspects), None)
        first = None if own is not None else self._waiting.first()
        if own is None and (first is None or first.number not in self._suspects):
            return False
        if busy:
            return True
        if own is not None and not own.prefilling:
            self._decode.add(draft, own)
            return bool(draft.decodes)
        draft.allow_prompts()
        if own is not None:
            self._prefill.advance_alone(own, draft)
        elif first is not None:
            self._prefill.start_alone(first, draft)
        return draft.has_prompts or draft.restores
