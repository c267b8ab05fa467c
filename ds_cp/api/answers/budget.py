"""The memory that the front holds for its clients: bounded in sum, counted before it is taken.

A request is charged for its body as it arrives, and at its admission for its prompt and for the
largest answer that it can get. What does not fit any more is refused with 503 and a time to retry;
what has been admitted runs to its end.
"""

from __future__ import annotations

import psutil
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
FREE_BODY_BYTES = 64 * 1024  # bytes of a body that are not charged: no list of them is long

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
    """What one request holds of the budget, up to ``release``."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._unspent = 0  # of what is reserved
        self.size = 0

    def reserve(self, size: int) -> None:
        """Charge ``size`` bytes that the request may come to hold.

        Raises ``ApiError``: 503 while others hold the budget, 400 when it could never be had.
        """
        budget, whole = self._budget, self.size + size
        if budget.has_room(size, whole):
            budget.used += size
            self.size = whole
            self._unspent += size
            return
        most = int(budget.limit * LARGE_SHARE)
        if whole > most:
            raise ApiError(
                400,
                f"this request may need {_mib(whole)} MiB for its body and its answer; at most "
                f"{_mib(most)} MiB of server.max_buffered_bytes are for one; "
                "lower max_tokens, n or the number of log-probabilities, or raise that limit",
                code="request_too_large",
            )
        raise ApiError(
            503,
            f"this request may need {_mib(whole)} MiB for its body and its answer, and others hold "
            f"{_mib(budget.used - self.size)} of {_mib(budget.limit)} MiB "
            "(server.max_buffered_bytes); try again in a moment, "
            "or lower max_tokens, n or the number of log-probabilities",
            code="server_busy",
            headers=RETRY_AFTER,
        )

    def spend(self, size: int) -> None:
        """Take ``size`` bytes of what is reserved. What is not, is charged now and never refused:
        the request has been admitted."""
        over = max(size - self._unspent, 0)
        self._unspent = max(self._unspent - size, 0)
        self.size += over
        self._budget.used += over

    @property
    def spent(self) -> int:
        """Bytes that it has taken, of ``size``."""
        return self.size - self._unspent

    def take(self, size: int) -> None:
        """Reserve and spend at once."""
        self.reserve(size)
        self.spend(size)

    def release(self) -> None:
        """Give back everything. May be called twice."""
        self._budget.used -= self.size
        self.size = self._unspent = 0


class HoldMemory:
    """ASGI layer: gives every request a ``Held`` in ``scope["state"]["held"]``, charges its body,
    and releases it once the answer was sent or its client has left."""

    def __init__(self, app: ASGIApp, budget: Budget) -> None:
        self.app = app
        self._budget = budget
        self._trimmer = Trimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = Held(self._budget)
        scope.setdefault("state", {})["held"] = held
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            before = max(received, FREE_BODY_BYTES)
            received += len(message.get("body", b""))
            if received > before:
                held.take(BODY_BYTES * (received - before))
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self._trimmer.released(held.spent)
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
