"""The process from which workers of one rank are forked, with the libraries and the model loaded.

The first worker forks it from itself when it has loaded and packed the model, before it meets any
other: it has no threads then, and no connections. So both have one copy of the weights, as has
every worker that is forked later, since nobody writes to them. The server waits for its supervisor,
to which it is the child, and ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec
import torch

from ds_cp.config import Config
from ds_cp.facts import Facts
from ds_cp.log_stream import rest_streams
from ds_cp.serve.detached import count_threads, fork_for, rename
from ds_cp.serve.forking import LIMIT, Fork, Forked, FromServer, Serving, Settle, ToServer, Unfit
from ds_cp.startup.alone import build_unchecked
from ds_cp.startup.preload import Preloaded
from ds_cp.topology.job import Job
from ds_cp.worker.worker import Worker

SERVER, WORKER = "ds_cp.serve.fork_server", "ds_cp.serve.worker_process"
_HARD = 2  # omp_pause_hard


class Seated(NamedTuple):
    """What a forked worker has: the sockets of its own, and the worker before it met anybody."""

    channel: socket.socket
    orders: socket.socket
    job: Job
    facts: Facts
    worker: Worker
    folder: str


Live = Callable[[Seated], NoReturn]


class ForkServer:
    """``sock``: to the supervisor, a process of the number ``supervisor``. ``job``: without its
    socket; ``live``: the life of a forked worker."""

    def __init__(
        self, sock: socket.socket, supervisor: int, config: Config, job: Job, live: Live
    ) -> None:
        self._sock = sock
        self._supervisor = supervisor
        self._config = config
        self._job = job
        self._live = live
        self._facts: Facts | None = None
        self._worker: Worker | None = None

    def leave_behind(self, loaded: Preloaded, others: list[int]) -> None:
        """Fork the server from this process, which goes on without it. ``others``: descriptors of
        this process alone. Nothing but a word to the supervisor comes of it where there is nothing
        to share, or a thread is in the way."""
        if not loaded.is_whole:
            self._say(Unfit("the model is not loaded ahead, or its packed weights have no room"))
            return
        end_pools()
        rest_streams()
        gc.collect()
        gc.freeze()

        def serve() -> NoReturn:
            for fd in others:
                os.close(fd)
            self._serve(loaded)

        try:
            if (threads := count_threads()) > 1:
                self._say(Unfit(f"{threads - 1} threads of the libraries do not end"))
            else:
                fork_for(self._supervisor, serve)
        except OSError as err:
            self._say(Unfit(f"no process can be forked: {err}"))

    def _serve(self, loaded: Preloaded) -> NoReturn:
        try:
            rename(WORKER, SERVER, f"ds_cp fork {self._job.rank}")
            torch.set_num_threads(1)
            self._say(Serving(os.getpid()))
            while True:
                data, fds, _, _ = socket.recv_fds(self._sock, LIMIT, 3)
                if not data:
                    os._exit(0)
                asked = msgspec.msgpack.decode(data, type=ToServer)
                if isinstance(asked, Settle):
                    self._settle(loaded, asked.facts)
                else:
                    self._fork(asked, fds)
                for fd in fds:
                    os.close(fd)
        except BaseException as err:
            self._say(Unfit(f"{type(err).__name__}: {err}"[:500]))
            os._exit(1)

    def _settle(self, loaded: Preloaded, facts: Facts) -> None:
        worker = build_unchecked(self._job, self._config, facts, loaded)
        gc.collect()
        gc.freeze()
        self._facts, self._worker = facts, worker

    def _fork(self, asked: Fork, fds: list[int]) -> None:
        if self._worker is None or (threads := count_threads()) > 1:
            why = "it has no model" if self._worker is None else f"it has {threads} threads"
            self._say(Unfit(why))
            os._exit(1)
        try:
            fork_for(self._supervisor, lambda: self._become_worker(asked, fds))
        except OSError as err:
            self._say(Unfit(str(err)))

    def _become_worker(self, asked: Fork, fds: list[int]) -> NoReturn:
        assert self._facts is not None and self._worker is not None
        self._say(Forked(os.getpid()))
        self._sock.close()
        rename(SERVER, WORKER, f"ds_cp rank {self._job.rank}")
        sockets = [socket.socket(fileno=fd) for fd in fds]
        job = replace(self._job, store_socket=sockets[2] if asked.listens else None)
        torch.set_num_threads(self._facts.threads)
        self._live(Seated(sockets[0], sockets[1], job, self._facts, self._worker, asked.folder))

    def _say(self, word: FromServer) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(msgspec.msgpack.encode(word))


def end_pools() -> None:
    """End the threads of the OpenMP pool, which starts again when it is next used."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(str(library)).omp_pause_resource_all(_HARD)
