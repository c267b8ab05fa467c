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
from typing import NamedTuple

from ds_cp.config import Config
from ds_cp.facts import Facts
from ds_cp.model.private_folder import own_folder
from ds_cp.serve.channel import Channel, Take, WorkerSpec
from ds_cp.startup.resources import choose_threads, socket_environment
from ds_cp.topology.job import Job

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end the job
POLL_S = 0.1  # seconds between looks at a worker that has its time behind it
WAIT_S = 0.5  # seconds for a worker to end at the last


class Child(NamedTuple):
    """A worker process, the channel for plans and results, and, where it outlives the loss of its
    peers, the one for orders."""

    process: subprocess.Popen[bytes]
    channel: Channel
    orders: Channel | None

    def take(self, facts: Facts) -> None:
        """One that waits takes the place of one that has died, with these facts of the start.
        Raises ``EngineDeadError`` when it has ended."""
        self.channel.send(Take(facts))


@contextlib.contextmanager
def worker_child(
    config: Config, job: Job, outlives: bool = False, waits: bool = False
) -> Iterator[Child]:
    """Start this rank's worker; on leaving, wait for its end or kill it, and remove its temporary
    files. ``outlives``: it is to outlive the loss of its peers; ``waits``: it loads what does not
    depend on the others, and waits for ``take``. Raises ``ModelError`` where no files can be
    written."""
    with own_folder() as folder, _started(config, job, folder, outlives, waits) as started:
        yield started


@contextlib.contextmanager
def _started(config: Config, job: Job, folder: str, outlives: bool, waits: bool) -> Iterator[Child]:
    ours, theirs = socket.socketpair()
    asking, asked = socket.socketpair() if outlives else (None, None)
    asked_fd = asked.fileno() if asked is not None else -1
    listen_fd = job.store_socket.fileno() if job.store_socket is not None else -1
    threads = choose_threads(config, job.local_world_size or 1)
    # The worker starts with these signals blocked: a terminal's Ctrl-C is for the supervisor alone.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "ds_cp.serve.worker_process", str(theirs.fileno())],
            pass_fds=[fd for fd in (theirs.fileno(), listen_fd, asked_fd) if fd >= 0],
            env={
                **socket_environment(job),
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "TORCH_GLOO_LAZY_INIT": "0",  # peers connect when groups are made, and no later
                "PYTHONPATH": _python_path(os.environ),
            },
            stdin=subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        if asked is not None:
            asked.close()
    if job.store_socket is not None and not outlives:
        job.store_socket.close()  # the worker has it now; else the next one wants it too
    channel = Channel(ours)
    fields = {
        name: getattr(job, name)
        for name in ("rank", "world_size", "local_rank", "local_world_size", "hosts", "host",
                     "launcher", "store_host", "store_port", "store_shared", "interface", "secret")
    }  # fmt: skip
    try:
        channel.send(
            WorkerSpec(
                config.model_dump(mode="json", by_alias=True),
                fields,
                listen_fd,
                os.getpid(),
                folder,
                asked_fd,
                waits,
            )
        )
        yield Child(process, channel, None if asking is None else Channel(asking))
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WAIT_S)
        process.kill()
        process.wait()
        ours.close()
        if asking is not None:
            asking.close()


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
