"""Requests in flight all the time, every answer compared with the undisturbed one."""

from __future__ import annotations

import random
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG

BODIES: tuple[dict[str, Any], ...] = (
    {"prompt": LONG, "max_tokens": 200, "temperature": 0},
    {"prompt": LONG, "max_tokens": 120, "temperature": 1.0, "seed": 1},
    {"prompt": "Hi", "max_tokens": 80, "temperature": 0, "logprobs": 3},
    {"prompt": "Say", "max_tokens": 60, "temperature": 1.0, "seed": 2, "presence_penalty": 0.5},
    {"prompt": "One", "max_tokens": 50, "temperature": 0.7, "seed": 3, "n": 3},
    {"prompt": "Say", "max_tokens": 40, "temperature": 1.0, "seed": 4, "ignore_eos": False,
     "structured_outputs": {"regex": "[a-f]{200}"}},
    {"prompt": LONG[:40], "max_tokens": 30, "temperature": 0, "repetition_penalty": 1.2},
)  # fmt: skip
SPANNING = BODIES[0]
PROBE = BODIES[6]
IDLE_S = 120.0  # for all requests to end


@dataclass
class Tally:
    """Of all lives of a run. ``refused``: answers of a server that was to end; the others are
    counted right or wrong. ``wrong``: what was asked and what came."""

    asked: int = 0
    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


class Load:
    """``flight`` requests at a time, in threads, from ``resume`` to ``pause``. ``expected``: the
    undisturbed answers to ``BODIES``."""

    def __init__(
        self, url: str, flight: int, expected: list[Any], rng: random.Random, tally: Tally
    ) -> None:
        self._url, self._flight, self._expected, self._rng = url, flight, expected, rng
        self._tally = tally
        self._goes_on = threading.Event()
        self._ends = False
        self.dies = False  # the server is to end: what it does not answer is not lost
        self._lock = threading.Lock()
        self._streams: list[Stream] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def streams(self) -> list[Stream]:
        """Those that are in flight."""
        with self._lock:
            return [stream for stream in self._streams if not stream.is_over]

    def ask(self, body: dict[str, Any], **fields: Any) -> Stream:
        """One more request, with fields that do not change its answer."""
        stream = Stream(self._url, body, **fields)
        with self._lock:
            self._streams.append(stream)
            self._tally.asked += 1
        return stream

    def resume(self) -> None:
        """Keep requests in flight from now on."""
        self._goes_on.set()

    def pause(self) -> None:
        """Wait until those in flight have ended; no more are asked until ``resume``."""
        self._goes_on.clear()
        limit = time.monotonic() + IDLE_S
        while self.pending:
            if time.monotonic() > limit:
                raise AssertionError(f"requests do not end: {[s.body for s in self.streams]}")
            time.sleep(0.02)

    @property
    def pending(self) -> int:
        """Requests whose answers were not counted yet."""
        with self._lock:
            return len(self._streams)

    def close(self) -> None:
        """``pause``, for ever."""
        if self._ends:
            return
        self.pause()
        self._ends = True
        self._thread.join(IDLE_S)

    def _run(self) -> None:
        while not self._ends:
            if self._goes_on.is_set():
                for _ in range(self._flight - len(self.streams)):
                    if not self.dies:
                        self.ask(self._rng.choice(BODIES))
            self._count()
            time.sleep(0.01)

    def _count(self) -> None:
        with self._lock:
            over = [stream for stream in self._streams if stream.is_over]
            for stream in over:
                self._streams.remove(stream)
                right = self._expected[BODIES.index(stream.body)]
                if not stream.errors and stream.answers == right:
                    self._tally.right += 1
                elif stream.gives_up or (self.dies and (stream.errors or not is_whole(stream))):
                    self._tally.refused += 1
                else:
                    said = f"{stream.body}: {stream.errors or stream.answers}"[:600]
                    self._tally.wrong.append(said)
                    self.dies = self.dies or "refused" in str(stream.errors)  # nobody is there
                    print(f"wrong: {said}", file=sys.stderr, flush=True)


def is_whole(stream: Stream) -> bool:
    """Whether it was told that all its answers had ended."""
    answers = stream.answers.values()
    return bool(answers) and all(answer["reason"] for answer in answers)


def gauge(url: str, name: str, only: str = "") -> float:
    """The sum of a metric over its labels, those among them in ``only``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((f"{name}{{", f"{name} ")) and only in line
    )
