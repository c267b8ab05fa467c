"""The process that a launcher starts on every rank: it owns the worker and ends with its launcher.

Rank 0's supervisor also runs the HTTP application and the engine. Ctrl-C and SIGTERM reach every
supervisor: rank 0 drains its requests and sends the stop plan to all workers; the other supervisors
wait for their worker to end and kill it when it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ds_cp.config import Config
from ds_cp.errors import DsCpError, EngineDeadError, ModelError
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.watch import FilesWatch, watch_model
from ds_cp.serve.channel import Channel, Failed, FromWorker, Ready, WorkerSpec
from ds_cp.startup.resources import choose_threads, socket_environment
from ds_cp.topology.job import Job

LEAVE_S = 5.0  # seconds for workers to end after the stop plan
POLL_S = 0.1  # seconds between looks at the worker and the launcher
HURRY_S = 1.0  # seconds for the current step, when requests are not drained
# Signals that end the job.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Words in the command line of a launcher's process.
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "mpirun", "prterun", "prted", "ds-cp")


def serve(config: Config, job: Job) -> int:
    """Serve until a signal, or until a failure ends the job. Returns the exit code.

    Raises ``LaunchError`` or ``ModelError`` before any process is started.
    """
    return asyncio.run(_Supervisor(config, job).run())


class _Supervisor:
    def __init__(self, config: Config, job: Job) -> None:
        self._config = config
        self._job = job
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()  # end now rather than drain
        self._loaded = False  # the worker can run plans
        self._notified = False  # the cause of a failure was printed here, or reported to rank 0
        self._exit_code = 0
        self._ancestors = _launcher_processes()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        leads = self._job.rank == 0
        found = (find_model(self._config.model), self._bind()) if leads else None
        files = self._watch_files()  # as they are before the worker reads them
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        with _worker(self._config, self._job) as (process, channel):
            watch = asyncio.create_task(self._watch(process))
            if files is not None:
                files.start()
            try:
                if found is not None:
                    await self._serve_http(channel, *found)
                else:
                    await self._follow(channel)
                await asyncio.wait({watch}, timeout=LEAVE_S)
            finally:
                watch.cancel()
        return self._exit_code

    def _watch_files(self) -> FilesWatch | None:
        """One process of each host looks after the model's files there."""
        if self._job.rank != 0 and self._job.local_rank != 0:
            return None

        def say(line: str) -> None:
            with contextlib.suppress(OSError, ValueError):
                print(f"ds_cp: warning: {line}", file=sys.stderr, flush=True)

        try:
            return watch_model(find_model(self._config.model), say)
        except ModelError:  # the worker says it
            return None

    def _bind(self) -> list[socket.socket]:
        from ds_cp.api.transport.listen import bind

        server = self._config.server
        return bind(server.host, server.port, lambda line: print(f"ds_cp: {line}", file=sys.stderr))

    # --- rank 0: the HTTP application

    async def _serve_http(
        self, channel: Channel, source: ModelSource, listeners: list[socket.socket]
    ) -> None:
        from ds_cp.api.app import create_app
        from ds_cp.api.transport.listen import urls
        from ds_cp.api.transport.server import serve_until
        from ds_cp.serve.async_engine import AsyncEngine
        from ds_cp.serve.worker_link import ProcessLink, WorkerLostError

        server = self._config.server
        loop = asyncio.get_running_loop()
        addresses = urls(listeners)

        def on_ready(ready: Ready) -> None:
            self._loaded = True
            with contextlib.suppress(OSError):  # it serves, even if stdout cannot be written
                for line in ready.summary:
                    print(line)
                print(f"ds_cp ready: {addresses}", flush=True)

        def on_death(err: DsCpError, exit_code: int) -> None:
            if not isinstance(err, WorkerLostError):  # _watch reports the exit code
                loop.call_soon_threadsafe(self._fail, str(err), exit_code)

        engine = AsyncEngine(
            self._config,
            source.name,
            ProcessLink(channel),
            loop,
            partial(_load_tokenizer, source),
            on_ready,
            on_death,
        )
        engine.start()
        app = create_app(engine, server)
        serving = asyncio.create_task(serve_until(app, listeners, server, self._stop))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({serving, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        hurried = hurrying.done()
        hurrying.cancel()
        if hurried:  # requests in flight end with an error, so the server need not wait
            await engine.stop(HURRY_S if self._loaded else 0.0)
        await serving
        if not hurried:
            await engine.stop(LEAVE_S if self._loaded else 0.0)

    # --- other ranks

    async def _follow(self, channel: Channel) -> None:
        """Wait until the worker ends: after rank 0's stop plan, or by a failure, which rank 0
        reports."""
        try:
            message = await asyncio.to_thread(channel.receive, FromWorker)
            if isinstance(message, Ready):
                self._loaded = True
                message = await asyncio.to_thread(channel.receive, FromWorker)
            if isinstance(message, Failed):
                self._notified, self._exit_code = True, message.exit_code
        except EngineDeadError:
            pass  # the worker has ended; _watch reports the exit code

    # --- signals and deaths

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGINT or self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _fail(self, message: str, exit_code: int) -> None:
        if not self._stop.is_set():
            self._notified, self._exit_code = True, exit_code
            print(f"ds_cp: error: {message}", file=sys.stderr, flush=True)
            self._stop.set()

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Stop when the launcher has ended, and kill a worker that outlives its time."""
        asked: float | None = None
        loop = asyncio.get_running_loop()
        while process.poll() is None:
            await asyncio.sleep(POLL_S)
            if not all(map(_is_alive, self._ancestors)):
                self._hurry.set()
                self._stop.set()
            if self._stop.is_set():
                asked = asked or loop.time()
                if loop.time() - asked >= self._patience_s():
                    process.kill()
        self._report_end(process.returncode)

    def _patience_s(self) -> float:
        """Seconds after the stop until the worker is killed: 0 while it loads, since nothing runs
        that could be drained; no limit on rank 0, where the engine ends it."""
        if not self._loaded:
            return 0.0
        if self._job.rank == 0:
            return math.inf
        return LEAVE_S + (0.0 if self._hurry.is_set() else self._config.server.drain_timeout_s)

    def _report_end(self, code: int) -> None:
        """Report a worker that ended without a report of its own."""
        if code == 0 or self._stop.is_set():
            return
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        if not self._notified:
            self._fail(f"the worker of rank {self._job.rank} was ended by {how}", 1)
        self._stop.set()


def _load_tokenizer(source: ModelSource) -> Any:
    """Rank 0 alone imports it: the supervisors of other ranks go without torch."""
    from ds_cp.model.loading import load_tokenizer

    return load_tokenizer(source)


def _launcher_processes() -> list[psutil.Process]:
    """The launcher's processes above this one. When one of them ends, the job has lost its owner:
    SIGTERM to ``deepspeed`` ends its first process only and would orphan every rank.
    """
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            words = process.cmdline()[:4]
            if not any(name in os.path.basename(word) or name in word.split(".")
                       for word in words for name in LAUNCHERS):  # fmt: skip
                break
            found.append(process)
    return found


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _python_path(env: Mapping[str, str]) -> str:
    """The worker finds the same ``ds_cp`` as this process, installed or not, from any folder."""
    ours, others = str(Path(__file__).resolve().parents[2]), env.get("PYTHONPATH")
    return os.pathsep.join([ours, others] if others else [ours])


@contextlib.contextmanager
def _worker(config: Config, job: Job) -> Iterator[tuple[subprocess.Popen[bytes], Channel]]:
    """Start this rank's worker; on leaving, wait for its end or kill it."""
    ours, theirs = socket.socketpair()
    listen_fd = job.store_socket.fileno() if job.store_socket is not None else -1
    threads = choose_threads(config, job.local_world_size or 1)
    # The worker starts with these signals blocked: a terminal's Ctrl-C is for the supervisor alone.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "ds_cp.serve.worker_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno(), *([listen_fd] if listen_fd >= 0 else [])],
            env={
                **socket_environment(job),
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": _python_path(os.environ),
            },
            stdin=subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    if job.store_socket is not None:
        job.store_socket.close()  # the worker has it now
    channel = Channel(ours)
    fields = {
        name: getattr(job, name)
        for name in ("rank", "world_size", "local_rank", "local_world_size", "hosts", "host",
                     "launcher", "store_host", "store_port", "store_shared", "interface")
    }  # fmt: skip
    try:
        channel.send(
            WorkerSpec(
                config.model_dump(mode="json", by_alias=True), fields, listen_fd, os.getpid()
            )
        )
        yield process, channel
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.kill()
        process.wait()
        ours.close()
