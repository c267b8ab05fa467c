"""What the ranks are to be told, or told again. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from ds_cp.plan import Sampling
from ds_cp.scheduler.admission import BEGIN_BYTES, Limits
from ds_cp.scheduler.draft import Draft
from ds_cp.scheduler.request import Request


def unreported(looking_back: Iterable[Request]) -> list[tuple[int, int, int]]:
    """Output tokens that the ranks do not know yet and penalties count, of these requests: (number,
    index, token). They are told now."""
    news = []
    for request in looking_back:
        if request.table is not None:
            for index in range(request.num_notified, len(request.output)):
                news.append((request.number, index, request.output[index]))
            request.num_notified = len(request.output)
    return news


class Forgotten:
    """Requests that run, and that the ranks have forgotten: they are told again. ``sampling``: how
    the ranks choose a request's tokens."""

    def __init__(
        self, limits: Limits, block_size: int, sampling: Callable[[Request], Sampling]
    ) -> None:
        self.requests: deque[Request] = deque()
        self._limits = limits
        self._block_size = block_size
        self._sampling = sampling

    def begin(self, draft: Draft) -> bool:
        """Enter as many as a plan may hold; whether the ranks know all of them then."""
        while self.requests:
            request = self.requests[0]
            if request.table is not None:  # else it has ended, or was preempted
                size = self._limits.begin_bytes(
                    request.num_tokens, self._block_size, request.params
                )
                if draft.begin_bytes and draft.begin_bytes + size > BEGIN_BYTES:
                    return False
                draft.begin_bytes += size
                request.num_notified = len(request.output)
                draft.begin(request, self._sampling(request))
            self.requests.popleft()
        return True
