"""The memory that the front holds for its clients: bounded in sum, counted before it is taken.

A request is charged for its body while this is read (``Bodies``), then for what it keeps of it,
and at its admission for the largest answer that it asks for. What does not fit any more is refused
with 503 and a time to retry; what has been admitted runs to its end.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
from starlette.types import ASGIApp, Receive, Scope, Send

from ds_cp.api.answers.trim import Trimmer
from ds_cp.api.errors import RETRY_AFTER, ApiError

MIB = 2**20
# Bytes of memory per unit, measured and rounded up.
BODY_BYTES = 6  # per byte of a body: as received, as text, and parsed
ID_BYTES = 48  # per token id of a list
ENTRY_BYTES = 128  # per log-probability with its token, as JSON
PACKED_BYTES = 16  # per log-probability, packed; and for each token:
PACKED_TOKEN_BYTES = 80
TEXT_BYTES = 8  # per token of a text as JSON; what a token has beyond is charged as it comes
DELTA_BYTES = 48  # per token of a stream that waits for its client: text and id
REQUEST_BYTES = 128 * 1024  # per request: its tasks, and what its connection's buffers hold

AUTO_SHARE = 1 / 8  # of the machine's memory
AUTO_RANGE = (256 * MIB, 8192 * MIB)  # bytes
LARGE_SHARE = 3 / 4  # of the budget for large requests; the rest is for small ones alone
SMALL_SHARE = 1 / 1024  # of the budget: what a small request takes at most, or
SMALL_BYTES = MIB


class Budget:
    """Bytes that all requests together may hold."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def has_room(self, more: int, whole: int) -> bool:
        """Whether a request that holds ``whole`` bytes in the end may take ``more`` now. Large
        requests leave a part of the budget to the small ones, so that they cannot keep them out."""
        small = whole <= max(self.limit * SMALL_SHARE, SMALL_BYTES)
        return self.used + more <= self.limit * (1.0 if small else LARGE_SHARE)


class Held:
    """What one request holds of the budget, up to ``release``: what it may come to hold, or what it
    has taken if that is more. ``freed`` is told of bytes that it had taken and gives back."""

    def __init__(self, budget: Budget, freed: Callable[[int], None] = lambda _: None) -> None:
        self._budget = budget
        self._freed = freed
        self._reserved = 0
        self.spent = 0  # bytes that it has taken
        self.size = 0  # bytes that it is charged

    def has_room(self, size: int) -> bool:
        """Whether ``size`` bytes can be reserved now."""
        return self._budget.has_room(size, self.size + size)

    def check_size(self, size: int) -> None:
        """Raises ``ApiError`` 400 when ``size`` bytes more could never be had."""
        whole, most = self.size + size, int(self._budget.limit * LARGE_SHARE)
        if whole > most and not self.has_room(size):
            raise ApiError(
                400,
                f"this request may need {_mib(whole)} MiB for its body and its answer; at most "
                f"{_mib(most)} MiB of server.max_buffered_bytes are for one; "
                "lower max_tokens, n or the number of log-probabilities, or raise that limit",
                code="request_too_large",
            )

    def reserve(self, size: int) -> None:
        """Charge ``size`` bytes that the request may come to hold.

        Raises ``ApiError``: 503 while others hold the budget, 400 when it could never be had.
        """
        self.check_size(size)
        if self.has_room(size):
            self._charge(self._reserved + size, self.spent)
            return
        budget = self._budget
        raise ApiError(
            503,
            f"this request may need {_mib(self.size + size)} MiB for its body and its answer, and "
            f"others hold {_mib(budget.used - self.size)} of {_mib(budget.limit)} MiB "
            "(server.max_buffered_bytes); try again in a moment, "
            "or lower max_tokens, n or the number of log-probabilities",
            code="server_busy",
            headers=RETRY_AFTER,
        )

    def spend(self, size: int) -> None:
        """Take ``size`` bytes of what is reserved. What is not, is charged now and never refused:
        the request has been admitted."""
        self._charge(self._reserved, self.spent + size)

    def unspend(self, size: int) -> None:
        """``size`` bytes that were taken are free, and may be taken again."""
        self._charge(self._reserved, self.spent - size)
        self._freed(size)

    def take(self, size: int) -> None:
        """Reserve and spend at once."""
        self.reserve(size)
        self.spend(size)

    def give_back(self, size: int) -> None:
        """The opposite of ``take``."""
        self._charge(self._reserved - size, self.spent - size)
        self._freed(size)

    def moved(self) -> Held:
        """Another one that holds all of this, which holds nothing then."""
        other = Held(self._budget, self._freed)
        reserved, spent = self._reserved, self.spent
        self._charge(0, 0)
        other._charge(reserved, spent)
        return other

    def release(self) -> None:
        """Give back everything. May be called twice."""
        freed = self.spent
        self._charge(0, 0)
        self._freed(freed)

    def _charge(self, reserved: int, spent: int) -> None:
        before = self.size
        self._reserved, self.spent, self.size = reserved, spent, max(reserved, spent)
        self._budget.used += self.size - before


class HoldMemory:
    """ASGI layer: gives every request a ``Held`` in ``scope["state"]["held"]``, and releases it
    once the answer was sent or its client has left."""

    def __init__(self, app: ASGIApp, budget: Budget) -> None:
        self.app = app
        self._budget = budget
        self._trimmer = Trimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = Held(self._budget, self._trimmer.released)
        scope.setdefault("state", {})["held"] = held
        try:
            await self.app(scope, receive, send)
        finally:
            held.release()


def held_by(scope: Scope) -> Held:
    """What the request of this scope holds."""
    held: Held = scope["state"]["held"]
    return held


def auto_bytes() -> int:
    """The budget's default: a share of this machine's memory."""
    low, high = AUTO_RANGE
    return max(low, min(high, int(psutil.virtual_memory().total * AUTO_SHARE)))


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"
