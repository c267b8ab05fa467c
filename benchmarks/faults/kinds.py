"""The kinds of faults: what is done, and what must follow.

``Effect.GOES_ON``: every request in flight gets its undisturbed answer. ``Effect.ENDS``: the server
cannot go on; it ends within ``END_S``, says why, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import enum
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from benchmarks.faults import outside
from benchmarks.faults.load import Load
from tests.helpers.jobs import Job, post

MEND_S = 180.0
HEADROOM = 1 << 20  # bytes that a process may still map where memory is short


class Effect(enum.Enum):
    """What a fault may cost."""

    GOES_ON = "goes on"
    ENDS = "ends"


@dataclass(frozen=True)
class Scene:
    """Where a fault happens."""

    job: Job
    url: str
    ranks: int
    load: Load
    disk: outside.SmallDisk | None
    rng: random.Random
    notes: list[str] = field(default_factory=list)  # what exactly was done

    def workers(self) -> dict[int, psutil.Process]:
        """The worker of each rank: the older process, where another one waits."""
        found: dict[int, psutil.Process] = {}
        for rank in range(self.ranks):
            if processes := self.job.matching("serve.worker_process", rank):
                found[rank] = min(processes, key=psutil.Process.create_time)
        return found

    def worker(self) -> psutil.Process:
        """Any rank's."""
        found = self.job.until("a worker", lambda: list(self.workers().values()), MEND_S)
        return self.rng.choice(found)

    def supervisor(self, rank: int) -> psutil.Process:
        """Of a rank: the parent of its worker."""
        found = self.job.until("a worker", lambda: self.workers().get(rank), MEND_S)
        parent: psutil.Process = found.parent()
        return parent


@dataclass(frozen=True)
class Kind:
    """``act`` does it. ``phases``: in which it makes sense."""

    name: str
    act: Callable[[Scene], None]
    phases: tuple[str, ...]
    effect: Effect = Effect.GOES_ON


RUNNING = ("idle", "prefill", "decode", "loading", "migration", "drain")
WORKS = ("prefill", "decode", "migration")


def _kill(scene: Scene) -> None:
    scene.worker().kill()


def _kill_two(scene: Scene) -> None:
    workers = list(scene.workers().values())
    for worker in scene.rng.sample(workers, min(2, len(workers))):
        worker.kill()


def _kill_fork_server(scene: Scene) -> None:
    """And its worker, so that a new process takes that one's place, with a server of its own."""
    if servers := scene.job.matching("serve.fork_server"):
        server = scene.rng.choice(servers)
        supervisor = server.ppid()
        server.kill()
        for worker in scene.workers().values():
            if worker.ppid() == supervisor:
                worker.kill()


def _abort(scene: Scene) -> None:
    scene.worker().send_signal(signal.SIGSEGV)


def _stop_for(seconds: float) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        worker = scene.worker()
        worker.suspend()
        time.sleep(seconds)
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()

    return act


def _stop(scene: Scene) -> None:
    scene.worker().suspend()


def _stop_supervisor(scene: Scene) -> None:
    supervisor = scene.supervisor(scene.rng.randrange(scene.ranks))
    supervisor.suspend()
    time.sleep(1.0)
    supervisor.resume()


def _kill_supervisor(scene: Scene) -> None:
    scene.supervisor(scene.rng.randrange(1, scene.ranks)).kill()


def _kill_front(scene: Scene) -> None:
    scene.supervisor(0).kill()


def _kill_launcher(scene: Scene) -> None:
    scene.job.process.kill()


def _on_a_connection(act: Callable[[psutil.Process, int], None]) -> Callable[[Scene], None]:
    def choose(scene: Scene) -> None:
        for _ in range(10):  # one may have gone by then
            with contextlib.suppress(psutil.Error, OSError):
                worker = scene.worker()
                fd = scene.rng.choice(outside.connections(worker))
                scene.notes.append(outside.describe(worker, fd))
                act(worker, fd)
                return

    return choose


def _close(scene: Scene) -> None:
    _on_a_connection(outside.close_connection)(scene)


def _half(scene: Scene) -> None:
    _on_a_connection(lambda worker, fd: outside.send_half(worker, fd, scene.rng))(scene)


def _garbage(scene: Scene) -> None:
    addresses = outside.listening(scene.job.processes())
    threads = [
        threading.Thread(target=outside.garbage, args=(address, random.Random(scene.rng.random())))
        for address in addresses
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _no_memory(scene: Scene) -> None:
    worker = scene.worker()
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        outside.no_more_memory(worker, HEADROOM)
        time.sleep(scene.rng.uniform(0.1, 1.0))
        outside.memory_again(worker)


def _exception(scene: Scene) -> None:
    scene.worker().send_signal(signal.SIGUSR1)


def _clock(scene: Scene) -> None:
    for process in [*scene.workers().values(), *(p.parent() for p in scene.workers().values())]:
        process.send_signal(signal.SIGUSR2)


def _full_disk(scene: Scene) -> None:
    assert scene.disk is not None
    scene.disk.fill()
    try:  # the journal is there, and what it has no room for is served all the same
        kept = post(f"{scene.url}/v1/responses", {"input": "Hi", "max_output_tokens": 4})
        assert kept["status"] in ("completed", "incomplete"), kept
        time.sleep(scene.rng.uniform(0.1, 1.5))
    finally:
        scene.disk.free()


def _client_leaves(scene: Scene) -> None:
    for stream in scene.rng.sample(scene.load.streams, min(2, len(scene.load.streams))):
        stream.leave()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("a worker is killed", _kill, RUNNING),
        Kind("two workers are killed", _kill_two, RUNNING),
        Kind("a fork server and its worker are killed", _kill_fork_server, RUNNING),
        Kind("a worker crashes (SIGSEGV)", _abort, RUNNING),
        Kind("a worker stands still for 1 s", _stop_for(1.0), RUNNING),
        Kind("a worker stands still for ever", _stop, RUNNING),
        Kind("a supervisor stands still for 1 s", _stop_supervisor, RUNNING),
        Kind("a worker's connection is closed", _close, RUNNING),
        Kind("half a message, then the end", _half, RUNNING),
        Kind("garbage on every port", _garbage, (*RUNNING, "start")),
        Kind("no memory for a worker", _no_memory, WORKS),
        Kind("an exception in a kernel", _exception, WORKS),
        Kind("the clock jumps by an hour", _clock, RUNNING),
        Kind("the disk is full", _full_disk, WORKS),
        Kind("clients leave", _client_leaves, ("prefill", "decode", "migration", "drain")),
        Kind("a worker is killed as the job starts", _kill, ("start",), Effect.ENDS),
        Kind("a supervisor is killed", _kill_supervisor, ("idle", "prefill", "decode")),
        Kind("rank 0's supervisor is killed", _kill_front,
             ("idle", "prefill", "decode", "drain"), Effect.ENDS),
        Kind("the launcher is killed", _kill_launcher, ("idle", "decode"), Effect.ENDS),
    )
}  # fmt: skip
