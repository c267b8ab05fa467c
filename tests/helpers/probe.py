"""Looks at a server under attack from outside: its memory and its /health."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from dataclasses import dataclass, field

import psutil

MOST_BYTES = 4 * 2**30  # resident bytes at which a process is killed


@dataclass
class Probe:
    """A process and its children, and its /health, looked at four times a second. A process that
    takes too much memory is killed: it would take the machine with it."""

    url: str
    process: psutil.Process
    most: int = 0
    health_s: float = 0.0
    health_bad: int = 0
    killed: bool = False
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def memory(self) -> int:
        """Resident bytes of all."""
        return sum(self.memories)

    @property
    def memories(self) -> list[int]:
        """Resident bytes of the process, then of each that it started."""
        sizes = []
        with contextlib.suppress(psutil.Error):
            for process in [self.process, *self.process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    sizes.append(process.memory_info().rss)
        return sizes

    def __enter__(self) -> Probe:
        self._threads = [threading.Thread(target=run) for run in (self._sizes, self._health)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _sizes(self) -> None:
        while not self._over.wait(0.25):
            self.most = max(self.most, self.memory)
            if self.most > MOST_BYTES and not self.killed:
                self.killed = True
                self.process.kill()

    def _health(self) -> None:
        while not self._over.wait(0.25):
            began = time.monotonic()
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=20):
                    pass
            except OSError:  # a 503 as well
                self.health_bad += 1
            self.health_s = max(self.health_s, time.monotonic() - began)
