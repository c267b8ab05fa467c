"""Who may wait: a request that would find no place, or begin too late, is told at once when to come
again. Nothing is kept of it. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ds_cp.errors import LongWaitError, QueueFullError
from ds_cp.sampling_params import RequestOptions
from ds_cp.scheduler.admission import Limits
from ds_cp.scheduler.backlog import Load
from ds_cp.scheduler.fairness import Turns
from ds_cp.scheduler.forecast import Forecast
from ds_cp.scheduler.queue import WaitingQueue
from ds_cp.scheduler.request import Request

MAX_RETRY_S = 600  # seconds after which a client is asked to come again, at most
BEYOND = 2  # times scheduler.max_queue that clients with less than their part may fill it to
PROMISED = 16  # times scheduler.max_queue: places that are given to clients that are to come again
RECENT_S = 10.0  # seconds after a refusal in which the engine counts as overloaded
EVERYTHING = float("inf")


class Door:
    """``waiting`` and ``turns`` are the scheduler's own; ``clock``: seconds."""

    def __init__(
        self,
        limits: Limits,
        waiting: WaitingQueue,
        turns: Turns,
        forecast: Forecast,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._waiting = waiting
        self._turns = turns
        self.forecast = forecast
        self._clock = clock
        self._promised = -math.inf  # when the last client that was refused is to come again
        self._refused_at = -math.inf
        self.num_refused = 0

    @property
    def is_overloaded(self) -> bool:
        """Whether a request was refused lately. Takes no lock."""
        return self._clock() - self._refused_at < RECENT_S

    def wait_s(self, options: RequestOptions, answers: int = 1) -> float:
        """Predicted seconds until a new request begins."""
        ahead, has_room = self._ahead(options)
        return self.forecast.wait_s(options, ahead, answers, has_room)

    def enter(self, options: RequestOptions, answers: int = 1) -> float:
        """Let a request in, whatever its prompt. Returns what ``forecast.began`` wants to know of
        it. Raises ``QueueFullError`` (``LongWaitError``) with the seconds after which it should
        come again."""
        length, most = len(self._waiting), self._limits.max_queue
        if length >= most and not self._has_part(options.client, length):
            raise self._refusal(QueueFullError, f"{length} requests are waiting, the limit of "
                                "scheduler.max_queue", 0.0)  # fmt: skip
        ahead, has_room = self._ahead(options)
        raw_s = self.forecast.raw_s(options, ahead, answers, has_room)
        wait_s, bound = raw_s * self.forecast.correction, self._limits.max_queue_wait_s
        if bound is not None and wait_s > bound:
            said = f"{wait_s:.3g} s would pass until this request begins, above the limit "
            raise self._refusal(
                LongWaitError, f"{said}scheduler.max_queue_wait_s of {bound:g} s",
                wait_s - bound,
            )  # fmt: skip
        return raw_s

    def began(self, request: Request) -> None:
        """A request has its first token."""
        started, expected_s = request.first_scheduled_time, request.expected_wait_s
        if started is not None and expected_s is not None and not request.num_preemptions:
            self.forecast.began(expected_s, max(0.0, started - request.arrival_time))

    def _ahead(self, options: RequestOptions) -> tuple[Load, bool]:
        first = self._waiting.first()
        ahead = self._waiting.before(options.priority, self._turns.next(options.client))
        return ahead, first is None or first.refusal is None

    def _has_part(self, client: str, length: int) -> bool:
        """Whether a client has less than its equal part of a queue that others have filled."""
        own = self._waiting.of_client(client)
        clients = self._waiting.num_clients + (not own)
        most = self._limits.max_queue
        return clients > 1 and own < most // clients and length < BEYOND * most

    def _refusal(self, kind: type[QueueFullError], why: str, least_s: float) -> QueueFullError:
        """Those that are refused get places one after the other, as requests start, up to
        ``PROMISED`` queues of them: who comes again before its time is given more than one."""
        now, waiting = self._clock(), len(self._waiting)
        self._refused_at = now
        self.num_refused += 1
        load = self._waiting.before(EVERYTHING, EVERYTHING)
        interval_s = self.forecast.interval_s(load, waiting)
        last = now + least_s + PROMISED * self._limits.max_queue * interval_s
        self._promised = min(max(self._promised, now + least_s) + interval_s, last)
        seconds = max(1, min(math.ceil(self._promised - now), MAX_RETRY_S))
        return kind(f"{why}; try again in {seconds} s", seconds)
