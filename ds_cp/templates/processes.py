"""The processes in which chat templates are rendered, seen from the server.

A template is a program that comes with the model: it may loop or allocate without end. So it runs
in a process of its own, under limits that the kernel keeps. One process (the nursery) imports
transformers once and forks the others (workers), so that a worker that was ended is replaced within
milliseconds. A worker renders one conversation at a time.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import threading
import time

from ds_cp.frames import frame, receive
from ds_cp.sandbox import start_beside
from ds_cp.templates.messages import (
    Answer,
    Ended,
    Failed,
    Job,
    Limits,
    Look,
    Looked,
    Render,
    Rendered,
)

GRACE_S = 1.0  # seconds after a job's time in which the kernel should have ended its worker
MAX_IDLE = 4  # workers that are kept for the next job
_TRIES = 3  # workers that a job is given to, when they are gone before they read it
_CLOSE_S = 1.0  # seconds for the nursery to end after its socket was closed


class TemplateProcesses:
    """A nursery and its workers. May be called from several threads.

    The nursery is started by the first job, and again when it is gone. It ends when
    this process ends, however that happens: its end of a socket is closed then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[socket.socket] = []
        self._closed = False

    def run(self, work: Render | Look, limits: Limits) -> Answer:
        """Do one piece of work. ``Ended`` with ``signal.SIGPROF`` is a job that computed for too
        long.

        Raises ``TimeoutError`` after ``limits.wall_s`` seconds, ``OSError`` when no process can be
        started, and ``UnicodeEncodeError`` for messages with half a surrogate pair.
        """
        deadline = time.monotonic() + limits.wall_s
        raw = frame(Job(work, limits))
        for _ in range(_TRIES):
            worker = self._take()
            answer = self._ask(worker, raw, deadline)
            if isinstance(answer, Failed) and answer.kind == "unavailable":
                raise OSError(answer.reason)
            if answer is not None:
                return answer
        raise OSError("the processes that render chat templates end at once")

    def _ask(self, worker: socket.socket, raw: bytes, deadline: float) -> Answer | None:
        """A worker's answer; None when it is gone and has not read the job, or the nursery is."""
        answer: Answer | None = None
        try:
            worker.settimeout(max(deadline - time.monotonic(), 0.001))
            worker.sendall(raw)
            answer = receive(worker, Answer, deadline + GRACE_S)
        except TimeoutError:
            raise  # its own clock ends the worker
        except (OSError, ValueError):
            self._forget_dead_nursery()
            return None
        finally:
            stays = isinstance(answer, Rendered | Looked) or (
                isinstance(answer, Failed) and answer.kind not in ("memory", "unavailable")
            )
            if stays:
                self._put(worker)
            else:
                worker.close()
        if isinstance(answer, Ended) and answer.signal == signal.SIGALRM:
            raise TimeoutError("no rendering in time")
        return answer

    def close(self) -> None:
        """End all processes. Jobs that run raise ``OSError``."""
        with self._lock:
            self._closed = True
            nursery = self._nursery
            self._drop()
        if nursery is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                nursery.wait(_CLOSE_S)
            nursery.kill()
            nursery.wait()

    @property
    def pid(self) -> int | None:
        """The nursery's process id while it is kept; its children are the workers."""
        return None if self._nursery is None else self._nursery.pid

    # --- workers

    def _take(self) -> socket.socket:
        """The socket of an idle worker, or of a new one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if not _is_readable(worker):
                    return worker
                worker.close()  # it has ended meanwhile
            control = self._started()
            ours, theirs = socket.socketpair()
            try:
                socket.send_fds(control, [b"w"], [theirs.fileno()])
            except OSError:
                ours.close()
                self._drop()
                raise
            finally:
                theirs.close()
            return ours

    def _put(self, worker: socket.socket) -> None:
        with self._lock:
            if self._closed or len(self._idle) >= MAX_IDLE:
                worker.close()
            else:
                self._idle.append(worker)

    # --- the nursery; the lock is held

    def _started(self) -> socket.socket:
        if self._closed:
            raise OSError("the processes that render chat templates have been ended")
        if self._nursery is not None and self._nursery.poll() is not None:
            self._drop()
        if self._control is None:
            self._nursery, self._control = start_beside("ds_cp.model.chat_template")
        return self._control

    def _forget_dead_nursery(self) -> None:
        with self._lock:
            if self._nursery is not None and self._nursery.poll() is not None:
                self._drop()

    def _drop(self) -> None:
        for sock in [self._control, *self._idle]:
            if sock is not None:
                sock.close()
        self._control, self._nursery, self._idle = None, None, []


def _is_readable(sock: socket.socket) -> bool:
    """Whether there is something to read: from an idle worker, word of its end."""
    poll = select.poll()  # select() knows no descriptor above 1,023
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
