"""One server from its start to its end, with faults in it."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import psutil

from benchmarks.faults.books import books, shared_files
from benchmarks.faults.kinds import MEND_S, Effect, Kind, Scene
from benchmarks.faults.load import BODIES, PROBE, SPANNING, Load, Tally
from benchmarks.faults.outside import SmallDisk
from tests.helpers.jobs import Job, post
from tests.helpers.streams import Stream

END_S = 15.0  # from a fault that ends the server to its last process, on a machine that is busy
DRAIN_S = 90.0  # from a stop to the last process, with requests and a fault in between
SETTLE_S = 30.0  # for descriptors and processes to be what they were


@dataclass
class Outcome:
    """Of one fault. ``mended_s``: until a request that was asked after it had its answer;
    ``pauses_s``: the longest time without an event of each stream that was in flight; ``fault``:
    what was not as it has to be, "" where all was."""

    kind: str
    phase: str
    notes: list[str] = field(default_factory=list)
    mended_s: float = 0.0
    pauses_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    fault: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Life:
    """``start``: gives a new job; ``expected``: filled by the first life."""

    def __init__(
        self,
        start: Callable[[], Job],
        ranks: int,
        flight: int,
        disk: SmallDisk | None,
        expected: list[Any],
        tally: Tally,
        rng: random.Random,
    ) -> None:
        self._ranks, self._disk, self._rng, self._tally = ranks, disk, rng, tally
        self._job = start()
        self._url = ""
        self._flight, self._expected = flight, expected
        self._load: Load | None = None
        self._books: dict[str, Any] = {}

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: object) -> None:
        self._job.close()
        if self._load is not None:
            self._load.dies = True
            self._load.close()

    def begin(self) -> None:
        """Wait until it serves, and put it under load."""
        self._url = self._job.ready()
        if not self._expected:
            self._expected.extend(Stream(self._url, body).end() for body in BODIES)
        self._load = Load(self._url, self._flight, self._expected, self._rng, self._tally)
        self._books = books(self._job, self._url)
        self._load.resume()

    def suffer(self, kind: Kind, phase: str) -> Outcome:
        """One fault. Where the server ends with it, so does this life."""
        outcome = Outcome(kind.name, phase)
        try:
            if phase == "start":
                self._at_start(kind, outcome)
            elif kind.effect is Effect.ENDS:
                self._last(kind, phase, outcome)
            elif phase == "drain":
                self._in_drain(kind, outcome)
            else:
                self._one_of_many(kind, phase, outcome)
        except AssertionError as err:
            outcome.fault = str(err)[:8000]
            if self._load is not None:
                self._load.dies = True
        return outcome

    def wait_for(self, requests: int) -> None:
        """Until so many requests have been asked, of all lives together."""
        if self._job.process.poll() is None:  # else the next fault says so
            self._until("requests", lambda: self._tally.asked >= requests)

    def end(self) -> str:
        """A quiet end: what was left behind or went wrong, "" where nothing was."""
        try:
            return self._end()
        except (AssertionError, OSError) as err:
            self._job.close()
            return f"{err}{self._job.story()}"[:8000]

    def _end(self) -> str:
        assert self._load is not None
        if self._job.process.poll() is not None:
            self._load.dies = True
            return f"the server has ended{self._job.story()}"
        self._load.close()
        limit = time.monotonic() + SETTLE_S
        while (left := self._left()) and time.monotonic() < limit:
            time.sleep(0.2)
        if left:
            return f"left behind: {left}"
        self._job.process.terminate()
        self._job.gone(DRAIN_S)
        code = self._job.process.returncode
        return "" if code == 0 else f"exit code {code}{self._job.story()}"

    def _left(self) -> dict[str, Any]:
        now = books(self._job, self._url)
        return {name: (was, now[name]) for name, was in self._books.items() if now[name] != was}

    @property
    def _scene(self) -> Scene:
        assert self._load is not None
        return Scene(self._job, self._url, self._ranks, self._load, self._disk, self._rng)

    # --- faults that the server outlives

    def _one_of_many(self, kind: Kind, phase: str, outcome: Outcome) -> None:
        scene, load = self._scene, self._scene.load
        outcome.notes = scene.notes
        drained = self._prepare(phase, scene)
        hit, at = load.streams, time.monotonic()
        kind.act(scene)
        probe = load.ask(PROBE)
        self._until(f"an answer after {kind.name!r}", lambda: probe.is_over)
        outcome.mended_s = time.monotonic() - at
        if drained is not None:
            post(f"{self._url}/ranks/{drained}/reopen", {})
        load.resume()
        outcome.pauses_s = [longest_pause(stream, at) for stream in hit]
        assert self._job.process.poll() is None, f"the server has ended{self._job.story()}"

    def _until(self, what: str, done: Callable[[], bool]) -> None:
        """Wait for what a server that goes on does in time."""

        def found() -> bool:
            if self._job.process.poll() is not None:
                raise AssertionError(f"the server has ended{self._job.story()}")
            return done()

        self._job.until(what, found, MEND_S)

    def _prepare(self, phase: str, scene: Scene) -> int | None:
        """Bring the server into the phase. The rank that drains, if one does."""
        load = scene.load
        if phase == "idle":
            load.pause()
        elif phase == "prefill":
            load.ask(SPANNING, cache_salt=str(self._rng.random()))
            time.sleep(self._rng.uniform(0.0, 0.03))
        elif phase == "decode":
            self._until("tokens", lambda: any(3 <= s.count for s in load.streams))
        elif phase == "loading":
            with contextlib.suppress(psutil.NoSuchProcess):
                scene.worker().kill()
            time.sleep(self._rng.uniform(0.0, 1.0))
        elif phase == "migration":
            rank = self._rng.randrange(self._ranks)
            with contextlib.suppress(OSError):  # the others may not hold what runs
                post(f"{self._url}/ranks/{rank}/drain", {})
                return rank
        return None

    def _in_drain(self, kind: Kind, outcome: Outcome) -> None:
        scene, load = self._scene, self._scene.load
        outcome.notes = scene.notes
        load.ask(SPANNING)
        self._until("tokens", lambda: any(3 <= s.count for s in load.streams))
        load.dies = True  # whoever comes too late is refused
        self._job.process.terminate()
        self._job.until(
            "its drain", lambda: "stopping; requests in flight get" in self._job.err, 30
        )
        load.dies = False
        hit, at = load.streams, time.monotonic()
        kind.act(scene)
        self._job.gone(DRAIN_S)
        outcome.ended_s = time.monotonic() - at
        outcome.pauses_s = [longest_pause(stream, at) for stream in hit]
        load.close()
        code = self._job.process.returncode
        assert code == 0, f"exit code {code}{self._job.story()}"

    # --- faults that end it

    def _last(self, kind: Kind, phase: str, outcome: Outcome) -> None:
        scene, load = self._scene, self._scene.load
        if phase == "drain":
            self._job.process.terminate()
        else:
            self._prepare(phase, scene)
        load.dies = True
        at = time.monotonic()
        kind.act(scene)
        self._job.gone(END_S)
        outcome.ended_s = time.monotonic() - at
        load.close()

    def _at_start(self, kind: Kind, outcome: Outcome) -> None:
        """While it starts: it ends, with a cause, or it serves."""
        began = time.monotonic()
        self._job.until("a worker", lambda: self._job.matching("serve.worker_process"), 60)
        time.sleep(self._rng.uniform(0.0, 2.0))
        scene = Scene(self._job, self._url, self._ranks, None, self._disk, self._rng)  # type: ignore[arg-type]
        kind.act(scene)
        outcome.mended_s = time.monotonic() - began
        if kind.effect is Effect.GOES_ON:
            self.begin()
            outcome.fault = self.end()
            return
        at = time.monotonic()
        self._job.gone(END_S)
        outcome.ended_s = time.monotonic() - at
        assert "ds_cp: error" in self._job.err, f"it does not say why{self._job.story()}"


def longest_pause(stream: Stream, at: float) -> float:
    """Seconds without an event, at most, from the last one before ``at`` on."""
    times = list(stream.times)
    before = max((t for t in times if t <= at), default=at)
    since = [before, *(t for t in times if t > at)]
    return max((b - a for a, b in pairwise(since)), default=0.0)


def left_in_shared_memory(before: int) -> str:
    """After the end of a server: what of its shared memory is there still."""
    now = shared_files()
    return "" if now <= before else f"{now - before} files in shared memory were left"
