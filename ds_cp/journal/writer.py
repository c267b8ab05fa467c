"""A thread that writes a journal: what is submitted is gathered for a moment, written and synced
together. Nobody waits for it, and nothing fails with it: a journal never costs a request."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ds_cp.journal.file import Change, JournalFile
from ds_cp.journal.format import MAX_FRAME, Kind
from ds_cp.journal.stats import JournalStats
from ds_cp.log_stream import say

GATHER_S = 0.008  # seconds that a change waits for others to be synced with
MOST_BYTES = 1 << 20  # bytes of changes that do not wait
QUEUE_BYTES = 128 << 20  # bytes of changes that wait while a disk is slow
RETRY_S = 5.0  # seconds between tries to write again
REWRITE_S = 10.0  # seconds between rewrites, at least
CLOSE_S = 5.0  # seconds for what is left at the end


class Writer:
    """Writes to a ``JournalFile`` of at most ``max_bytes`` of what is live.

    A change that cannot be written is lost, and so is what is added to its key later; the state of
    the key that the file has stays. Deletions are not lost: they are written once writing works.
    """

    def __init__(self, file: JournalFile, max_bytes: int, gather_s: float = GATHER_S) -> None:
        self._file = file
        self._max = max_bytes
        self._gather_s = gather_s
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._groups: list[Sequence[Change]] = []
        self._queued = 0  # bytes of these, about
        self._callbacks: list[Callable[[bool], None]] = []
        self._spoiled: set[str] = set()  # keys of which a change was lost
        self._owed: dict[str, None] = {}  # keys that are to be dropped from the file
        self._broken = False
        self._said_full = self._said_slow = False
        self._rewrite_at = 0.0
        self._closing = False
        self._stats = JournalStats(size=file.size)
        self._thread = threading.Thread(target=self._run, name="ds_cp journal", daemon=True)
        self._thread.start()

    def submit(self, changes: Sequence[Change]) -> None:
        """Have changes written, together or not at all. Any thread; does not wait."""
        size = sum(_bytes(change) for change in changes)
        with self._wake:
            if self._closing:
                return
            slow = not self._broken and self._queued + size > QUEUE_BYTES
            if self._broken or slow:
                self._lose(changes)
                if slow and not self._said_slow:
                    self._said_slow = True
                    say(
                        f"warning: {QUEUE_BYTES} bytes wait for the journal's disk, which is too "
                        "slow; what comes meanwhile will not be resumed"
                    )
                return
            self._groups.append(changes)
            self._queued += size
            self._wake.notify()

    def when_synced(self, callback: Callable[[bool], None]) -> None:
        """Call ``callback``, in the writer's thread, once all that was submitted is synced; with
        False where it is not written."""
        with self._wake:
            working = not (self._broken or self._closing)
            if working:
                self._callbacks.append(callback)
                self._wake.notify()
        if not working:
            callback(False)

    def stats(self) -> JournalStats:
        """A snapshot."""
        with self._lock:
            return replace(self._stats, working=not self._broken)

    def close(self) -> None:
        """Write what is left, and end, within ``CLOSE_S`` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._file.close()

    # --- the writer's thread

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wait()
                groups, callbacks = self._groups, self._callbacks
                self._groups, self._callbacks, self._queued = [], [], 0
                closing, broken = self._closing, self._broken
            if broken and not closing:
                done = self._try(self._mend, [])
            else:
                done = not broken and self._try(partial(self._write, groups), groups)
            for callback in callbacks:
                callback(done)
            if closing:
                return

    def _wait(self) -> None:
        """Until there is something to do. The lock is held."""
        if self._broken:
            self._wake.wait_for(lambda: self._closing, RETRY_S)
            return
        self._wake.wait_for(lambda: self._groups or self._callbacks or self._closing)
        end = time.monotonic() + self._gather_s
        while not (self._closing or self._callbacks or self._queued > MOST_BYTES):
            left = end - time.monotonic()
            if left <= 0:
                return
            self._wake.wait(left)

    def _try(self, work: Callable[[], None], groups: Sequence[Sequence[Change]]) -> bool:
        try:
            work()
        except Exception as err:  # whatever it is, requests go on
            reason = getattr(err, "strerror", None) or f"{type(err).__name__}: {err}"
            with self._lock:
                if not self._broken:
                    say(
                        f"warning: the journal cannot be written ({reason}); requests go on, and "
                        f"what is not in it will not be resumed; it is tried again every "
                        f"{RETRY_S:g} s"
                    )
                self._broken = True
                for changes in (*groups, *self._groups):
                    self._lose(changes)
                self._groups, self._queued = [], 0
            return False
        return True

    def _write(self, groups: Sequence[Sequence[Change]]) -> None:
        made = [ready for changes in groups if (ready := self._made(changes))]
        kept = [fitting for changes in made if (fitting := self._fitting(changes))]
        began = time.monotonic()
        before = self._file.size
        count = self._file.append(kept)
        seconds, grown = time.monotonic() - began, self._file.size - before
        if self._file.is_loose and time.monotonic() > self._rewrite_at:
            self._rewrite_at = time.monotonic() + REWRITE_S
            with contextlib.suppress(OSError):  # it is only larger than it need be
                self._file.rewrite()
        with self._lock:
            stats = self._stats
            self._stats = replace(
                stats,
                records=stats.records + count,
                bytes=stats.bytes + grown,
                syncs=stats.syncs + (count > 0),
                sync_seconds=stats.sync_seconds + seconds * (count > 0),
                size=self._file.size,
            )

    def _made(self, changes: Sequence[Change]) -> Sequence[Change]:
        """A group with its bytes; without them, a fault of ds_cp, it is lost alone."""
        try:
            return [
                c if isinstance(c.data, bytes) else Change(c.kind, c.key, c.data()) for c in changes
            ]
        except Exception as err:
            say(f"warning: {changes[0].key} is not in the journal ({type(err).__name__}: {err})")
            with self._lock:
                self._lose(changes)
            return []

    def _fitting(self, changes: Sequence[Change]) -> Sequence[Change]:
        """Of a group what can be written: nothing is added to a key that lost something."""
        need = sum(_bytes(change) for change in changes if change.kind is not Kind.DROP)
        with self._lock:
            full = need > MAX_FRAME // 2 or (need > 0 and self._file.live + need > self._max)
            if full:
                self._lose(changes)
                if not self._said_full:
                    self._said_full = True
                    say(
                        f"warning: the journal has room for {self._max} bytes "
                        "(fault_tolerance.journal_max_bytes), and holds "
                        f"{self._file.live}; what does not fit will not be resumed"
                    )
                changes = [Change(Kind.DROP, key) for key in self._owed]
                self._owed = {}
            kept = []
            for change in changes:
                if change.kind is Kind.ADD and change.key in self._spoiled:
                    self._stats = replace(self._stats, lost=self._stats.lost + 1)
                    continue
                self._spoiled.discard(change.key)
                kept.append(change)
            return kept

    def _mend(self) -> None:
        """Write again: a new file, whatever became of the old one, and the deletions."""
        with self._lock:
            owed = list(self._owed)
        self._file.rewrite()
        self._file.append([[Change(Kind.DROP, key) for key in owed]])
        with self._lock:
            for key in owed:
                self._owed.pop(key, None)
            self._broken = False
            say("the journal is written again; requests that began meanwhile are not in it")

    def _lose(self, changes: Sequence[Change]) -> None:
        """The lock is held."""
        for change in changes:
            if change.kind is Kind.DROP:
                self._spoiled.discard(change.key)
                if change.key in self._file:
                    self._owed[change.key] = None
            else:
                self._spoiled.add(change.key)
                self._stats = replace(self._stats, lost=self._stats.lost + 1)

    def resumed(self, count: int) -> None:
        """Count requests that go on."""
        with self._lock:
            self._stats = replace(self._stats, resumed=self._stats.resumed + count)


def _bytes(change: Change) -> int:
    return change.size or (len(change.data) if isinstance(change.data, bytes) else 0)
