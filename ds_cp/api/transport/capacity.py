"""How many connections are open: a bound below the file limit, and who makes room at it."""

from __future__ import annotations

import logging
import resource
import time
from itertools import chain
from typing import Protocol

from ds_cp.config.fields import Auto

AUTO_CONNECTIONS = 1024  # connections open at once when server.max_connections is "auto"
EXTRA_CONNECTIONS = 16  # beyond the bound: they are told so, and /health is answered
RESERVED_FILES = 64  # files kept for everything else: listeners, workers, pipes, logs, libraries

logger = logging.getLogger("ds_cp.api")


class Evictable(Protocol):
    """A connection, as its capacity sees it."""

    def give_way(self) -> None:
        """Close at once."""


class Capacity:
    """The open connections of a server, at most ``most`` and ``EXTRA_CONNECTIONS``.

    A connection counts from its accept to its end. It is idle while no request of it is in flight,
    from its first bytes on or a short while after it came: before that it is silent, and its
    request may be on the way. At the bound the one that has been idle longest is closed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: set[Evictable] = set()
        self._idle: dict[Evictable, None] = {}  # the longest idle first
        self._silent: dict[Evictable, None] = {}  # those of which nothing was said yet
        self._extra: set[Evictable] = set()  # those beyond the bound

    def has_room(self) -> bool:
        """Whether another connection may be accepted now."""
        return len(self._open) < self.most + EXTRA_CONNECTIONS or bool(self._idle)

    def add(self, connection: Evictable) -> None:
        """A connection was accepted. It may cost another one its place."""
        if len(self._open) >= self.most:
            self.close_idle()  # which may be one beyond the bound
        if self._is_full():
            self._extra.add(connection)
        self._open.add(connection)
        self._silent[connection] = None

    def close_idle(self) -> bool:
        """Close the connection that has been idle longest; False if none is idle."""
        if not self._idle:
            return False
        longest = next(iter(self._idle))
        self.discard(longest)
        longest.give_way()
        return True

    def discard(self, connection: Evictable) -> None:
        """A connection has ended."""
        self._open.discard(connection)
        self._extra.discard(connection)
        self._idle.pop(connection, None)
        self._silent.pop(connection, None)

    def set_idle(self, connection: Evictable, idle: bool) -> None:
        """Whether it has no request in flight. The time that it is idle counts from the first call
        that says so."""
        self._silent.pop(connection, None)
        if not idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def is_beyond(self, connection: Evictable) -> bool:
        """Whether it is beyond the bound: it was accepted there, and no room came since."""
        return connection in self._extra and self._is_full()

    def take_place(self, connection: Evictable) -> bool:
        """Whether a request of it may be served. One beyond the bound changes places with one that
        has no request, if there is one."""
        if not self.is_beyond(connection):
            self._extra.discard(connection)
            return True
        others = (one for one in chain(self._idle, self._silent) if one not in self._extra)
        other = next(others, None)
        if other is None:
            return False
        self._extra.remove(connection)
        self._extra.add(other)
        return True

    def _is_full(self) -> bool:
        return len(self._open) - len(self._extra) >= self.most


def connection_bound(setting: Auto | int) -> int:
    """How many connections may be open. Raises the soft limit of open files as far as that needs
    and the hard limit allows, and stays below what it then is."""
    wanted = AUTO_CONNECTIONS if setting == "auto" else setting
    kept = EXTRA_CONNECTIONS + RESERVED_FILES
    files = raise_file_limit(wanted + kept)
    bound = max(1, min(wanted, files - kept))
    if setting != "auto" and bound < wanted:
        logger.warning(
            "server.max_connections is %d, but %d connections are taken at once: the hard limit of "
            "open files is %d, and %d are kept for other uses",
            wanted, bound, files, kept,
        )  # fmt: skip
    return bound


def raise_file_limit(wanted: int) -> int:
    """Raise the soft limit of open files of this process to ``wanted``, or to the hard limit if
    that is lower. Returns the limit, at most 2 ** 31."""
    infinite = resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    goal = wanted if hard == infinite else min(wanted, hard)
    if soft != infinite and soft < goal:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
            soft = goal
        except (OSError, ValueError):
            pass  # not allowed here: the bound follows the limit
    return 1 << 31 if soft == infinite else soft


class Seldom:
    """Logs at most one line in ``period_s`` seconds; the next line tells how many were left out."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next = 0.0
        self._left_out = 0

    def warning(self, text: str) -> None:
        """Log a line, or count it."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        more = f" ({self._left_out} more like it since)" if self._left_out else ""
        self._next, self._left_out = now + self._period_s, 0
        logger.warning("%s%s", text, more)
