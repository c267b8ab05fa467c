"""Processes that are forked for another one, and the supervisor's end of a fork server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from ds_cp.errors import EngineDeadError
from ds_cp.serve import forking
from ds_cp.serve.detached import Adopted, adopt, can_fork_servers
from ds_cp.serve.forking import Fork, Forked, Forks, Serving, ToServer, Unfit
from tests.helpers.jobs import ROOT
from tests.unit.serve.test_async_engine import FACTS

pytestmark = pytest.mark.skipif(not can_fork_servers(), reason="not on this system")
LIMIT_S = 60.0
# Forks one process for argv[1], which says its number on argv[2], and does argv[3].
FORKER = """
import os, signal, sys, time
from ds_cp.serve.detached import fork_for, rename
def work():
    rename("sys, time", "renamed", "a name")
    os.write(int(sys.argv[2]), b"%d\\n" % os.getpid())
    exec(sys.argv[3])
fork_for(int(sys.argv[1]), work)
"""


def forked(what: str, supervisor: int | None = None) -> tuple[subprocess.Popen[bytes], int]:
    """Who forked, and the number of what it has forked."""
    read, write = os.pipe()
    who = subprocess.Popen(
        [sys.executable, "-c", FORKER, str(supervisor or os.getpid()), str(write), what],
        pass_fds=[write], cwd=ROOT,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as pipe:
        return who, int(pipe.readline())


@pytest.fixture
def adopting() -> Iterator[None]:
    adopt(True)
    yield
    adopt(False)


@pytest.mark.parametrize(
    ("what", "code"),
    [("os._exit(7)", 7), ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
     ("raise SystemExit(3)", 1)],
)  # fmt: skip
def test_its_end_is_seen_by_code_and_signal(what: str, code: int, adopting: None) -> None:
    who, pid = forked(what)
    process = Adopted(pid)
    assert process.wait(LIMIT_S) == code == process.poll() == process.returncode
    assert who.wait(LIMIT_S) == 0
    process.kill()  # nothing: the number may be another process's
    assert not psutil.pid_exists(pid)


def test_it_outlives_who_forked_it(adopting: None) -> None:
    who, pid = forked("time.sleep(1000)")
    assert who.wait(LIMIT_S) == 0
    process = Adopted(pid)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    found = psutil.Process(pid)
    assert found.ppid() == os.getpid() and found.name() == "a name"
    assert "renamed" in " ".join(found.cmdline()) and found.cmdline()[0] == sys.executable
    process.kill()
    assert process.wait(LIMIT_S) == -signal.SIGKILL


def test_it_ends_with_its_supervisor() -> None:
    """Its parent dies, which is not who forked it."""
    script = (
        "import os, time\n"
        "from tests.unit.serve.test_detached import adopt, forked\n"
        "adopt(True)\n"
        "print(forked('time.sleep(1000)')[1], flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT
    ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert psutil.Process(pid).ppid() == supervisor.pid
        supervisor.kill()
        until(lambda: not psutil.pid_exists(pid) or is_zombie(pid))


def test_nobody_adopts_it() -> None:
    """It does not stay as a child of somebody else."""
    adopt(False)
    read, write = os.pipe()
    who = subprocess.Popen(
        [sys.executable, "-c",
         "import ds_cp.serve.detached as d, os\nd.ADOPTION_S = 0.1\n"
         f"d.fork_for({os.getpid()}, lambda: os.write({write}, b'it works'))"],
        pass_fds=[write], cwd=ROOT,
    )  # fmt: skip
    os.close(write)
    assert who.wait(LIMIT_S) == 0
    with os.fdopen(read) as pipe:
        assert pipe.read() == ""  # all ends of it are closed


class Server:
    """A fork server that is played."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.forks = Forks(self.ended.set)
        self.sock = socket.socket(fileno=os.dup(self.forks.theirs.fileno()))
        self.forks.theirs.close()

    def say(self, word: msgspec.Struct) -> None:
        self.sock.send(msgspec.msgpack.encode(word))

    def serve(self, answer: msgspec.Struct | None) -> list[int]:
        """Answer one ``Fork``; returns the descriptors that came along."""
        data, fds, _, _ = socket.recv_fds(self.sock, forking.LIMIT, 3)
        asked = msgspec.msgpack.decode(data, type=ToServer)
        assert asked == Fork("/folder", len(fds) == 3)
        if answer is not None:
            self.say(answer)
        return fds


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.sock.close()
    one.forks.close()
    assert one.ended.wait(LIMIT_S)


def until(done: object) -> None:
    limit = time.monotonic() + LIMIT_S
    assert callable(done)
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.005)


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def serving(server: Server) -> psutil.Process:
    """A process that stands for the server's."""
    process = psutil.Popen(["sleep", "1000"])
    server.say(Serving(process.pid))
    until(lambda: server.forks.is_serving)
    return process


@pytest.mark.parametrize("count", [2, 3])
def test_a_worker_is_forked(server: Server, count: int) -> None:
    process = serving(server)
    server.forks.settle(FACTS)
    assert msgspec.msgpack.decode(server.sock.recv(forking.LIMIT), type=ToServer).facts == FACTS
    pairs = [socket.socketpair() for _ in range(count)]
    given: list[int] = []
    thread = threading.Thread(target=lambda: given.extend(server.serve(Forked(process.pid))))
    thread.start()
    worker = server.forks.fork("/folder", [ours.fileno() for ours, _ in pairs])
    thread.join(LIMIT_S)
    assert worker.pid == process.pid and len(given) == count
    for fd, (ours, theirs) in zip(given, pairs, strict=True):
        os.write(fd, b"hello")
        assert theirs.recv(5) == b"hello"
        os.close(fd)
        ours.close()
        theirs.close()


@pytest.mark.parametrize("how", ["unfit", "silent", "gone"])
def test_a_server_that_gives_no_worker(
    server: Server, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up, and ended; whoever asks again is told at once."""
    process = serving(server)
    if how == "silent":
        monkeypatch.setattr(forking, "FORK_S", 0.1)

    def answer() -> None:
        if how == "gone":
            server.sock.shutdown(socket.SHUT_RDWR)
        else:
            server.serve(Unfit("it has 3 threads") if how == "unfit" else None)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(EngineDeadError):
        server.forks.fork("/folder", [])
    thread.join(LIMIT_S)
    why = {"unfit": "it has 3 threads", "silent": "did not answer", "gone": "has ended"}[how]
    assert not server.forks.is_open and not server.forks.is_serving
    until(lambda: is_zombie(process.pid))
    with pytest.raises(EngineDeadError, match=why):
        server.forks.fork("/folder", [])


def test_there_is_to_be_no_server(server: Server) -> None:
    server.say(Unfit("2 threads do not end"))
    until(lambda: not server.forks.is_open)
    assert server.forks.why == "2 threads do not end"
