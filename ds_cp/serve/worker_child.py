"""How a supervisor starts its worker process, sees its end at once, and never leaves it behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_cp.config import Config
from ds_cp.facts import Facts
from ds_cp.model.private_folder import own_folder
from ds_cp.serve.channel import Channel, Take, WorkerSpec
from ds_cp.serve.detached import WorkerProcess
from ds_cp.serve.forking import Forks
from ds_cp.startup.resources import choose_threads, socket_environment
from ds_cp.topology.job import Job

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end the job
POLL_S = 0.1  # seconds between looks at a worker that has its time behind it
WAIT_S = 0.5  # seconds for a worker to end at the last


class Child(NamedTuple):
    """A worker process, the channel for plans and results, and, where it outlives the loss of its
    peers, the one for orders."""

    process: WorkerProcess
    channel: Channel
    orders: Channel | None

    def take(self, facts: Facts) -> None:
        """One that waits takes the place of one that has died, with these facts of the start.
        Raises ``EngineDeadError`` when it has ended."""
        self.channel.send(Take(facts))


@contextlib.contextmanager
def worker_child(
    config: Config,
    job: Job,
    outlives: bool = False,
    waits: bool = False,
    forks: Forks | None = None,
) -> Iterator[Child]:
    """Start this rank's worker; on leaving, wait for its end or kill it, and remove its temporary
    files. ``outlives``: it is to outlive the loss of its peers; ``waits``: it loads what does not
    depend on the others, and waits for ``take``; ``forks``: for the server that it is to leave
    behind. Raises ``ModelError`` where no files can be written."""
    with own_folder() as folder, _sockets(outlives) as (ours, theirs):
        spec = WorkerSpec(
            config.model_dump(mode="json", by_alias=True),
            fields_of(job),
            job.store_socket.fileno() if job.store_socket is not None else -1,
            os.getpid(),
            folder,
            theirs[1].fileno() if outlives else -1,
            waits,
            forks.theirs.fileno() if forks is not None else -1,
        )
        process = _start(choose_threads(config, job.local_world_size or 1), job, theirs, spec)
        if forks is not None:
            forks.theirs.close()
        if job.store_socket is not None and not outlives:
            job.store_socket.close()  # the worker has it now; else the next one wants it too
        yield from _until_its_end(process, ours, spec)


@contextlib.contextmanager
def forked_child(job: Job, forks: Forks) -> Iterator[Child]:
    """The same for one that outlives others and is forked: it takes its place by itself. Raises
    ``EngineDeadError`` where none can be forked, ``ModelError``."""
    with own_folder() as folder, _sockets(True) as (ours, theirs):
        given = [*theirs, *([job.store_socket] if job.store_socket is not None else [])]
        process = forks.fork(folder, [one.fileno() for one in given])
        for one in theirs:
            one.close()
        yield from _until_its_end(process, ours)


def _until_its_end(
    process: WorkerProcess, ours: list[socket.socket], spec: WorkerSpec | None = None
) -> Iterator[Child]:
    channels = [Channel(one) for one in ours]
    try:
        if spec is not None:
            channels[0].send(spec)
        yield Child(process, channels[0], channels[1] if len(channels) > 1 else None)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WAIT_S)
        process.kill()
        process.wait()


@contextlib.contextmanager
def _sockets(orders: bool) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Our ends and the worker's: for plans and results, and for orders."""
    pairs = [socket.socketpair() for _ in range(1 + orders)]
    try:
        yield [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
    finally:
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def _start(threads: int, job: Job, theirs: list[socket.socket], spec: WorkerSpec) -> WorkerProcess:
    fds = [*(one.fileno() for one in theirs), spec.listen_fd, spec.forks_fd]
    # The pool of this library would start with the import, and be in the way of a fork.
    pools = {"OPENBLAS_NUM_THREADS": "1"} if spec.forks_fd >= 0 else {}
    # The worker starts with these signals blocked: a terminal's Ctrl-C is for the supervisor alone.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "ds_cp.serve.worker_process", str(theirs[0].fileno())],
            pass_fds=[fd for fd in fds if fd >= 0],
            env={
                **socket_environment(job),
                **pools,
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "TORCH_GLOO_LAZY_INIT": "0",  # peers connect when groups are made, and no later
                "PYTHONPATH": _python_path(os.environ),
            },
            stdin=subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for one in theirs:
            one.close()


def fields_of(job: Job) -> dict[str, Any]:
    """The fields of a job without its socket."""
    names = (
        "rank", "world_size", "local_rank", "local_world_size", "hosts", "host", "launcher",
        "store_host", "store_port", "store_shared", "interface", "secret",
    )  # fmt: skip
    return {name: getattr(job, name) for name in names}


@contextlib.contextmanager
def ended(pid: int) -> Iterator[asyncio.Event]:
    """An event that is set in the moment in which a child ends, where the kernel can tell (Linux);
    the child is not reaped."""
    event = asyncio.Event()
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):  # another system: who waits looks now and then
        yield event
        return
    loop = asyncio.get_running_loop()

    def on_end() -> None:
        loop.remove_reader(handle)  # it stays readable
        event.set()

    loop.add_reader(handle, on_end)
    try:
        yield event
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def until_end(watch: asyncio.Task[None], seconds: float, works: Callable[[], bool]) -> None:
    """Wait for the end of a worker, which ``watch`` sees, at most ``seconds``, and then as long as
    ``works()``."""
    await asyncio.wait({watch}, timeout=seconds)
    while not watch.done() and works():
        await asyncio.wait({watch}, timeout=POLL_S)


def describe_end(code: int, for_memory: bool = False) -> str:
    """How a child ended, from ``Popen.returncode``: ``SIGSEGV``, ``exit code 1``. ``for_memory``:
    the kernel says that it has ended a process for memory."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    if for_memory and name == "SIGKILL":
        return f"{name}, by the kernel, as the memory of its control group was full"
    why = {"SIGKILL": " (out of memory?)", "SIGBUS": " (a file of the weights was cut short?)"}
    return name + why.get(name, "")


def noticed(cause: str, since: float | None) -> str:
    """A cause with the time that it took to notice; ``since``: when all was well, in
    ``time.monotonic()``, None when it was said at once."""
    if since is None:
        return cause
    return f"{cause} (noticed within {max(0.1, time.monotonic() - since):.1f} s)"


def _python_path(env: Mapping[str, str]) -> str:
    """The worker finds the same ``ds_cp`` as this process, installed or not, from any folder."""
    ours, others = str(Path(__file__).resolve().parents[2]), env.get("PYTHONPATH")
    return os.pathsep.join([ours, others] if others else [ours])
