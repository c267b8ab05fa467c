"""A server over two hosts of two ranks each, made of network namespaces: what dies on one is known
on the other, and what can be replaced is."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.jobs import ROOT, Job
from tests.helpers.netns import Hosts, NamespaceError, Relay, two_hosts
from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG
from tests.launch.conftest import Start, Write

pytestmark = pytest.mark.netns

KV = {"tokens_per_rank": 160, "block_size": 16}  # so that LONG and its answer need all ranks
GREEDY = {"prompt": LONG, "max_tokens": 300, "temperature": 0}
SEEDED = {"prompt": "Hi", "max_tokens": 100, "temperature": 1.0, "seed": 5, "logprobs": 2}
SECRET = "0123456789abcdef0123456789abcdef"
END_S = 20.0  # seconds for all to end, of which most is for a busy machine


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with two_hosts() as found:
            yield found
    except NamespaceError as err:
        pytest.skip(f"two hosts cannot be made here: {err}; as root: make clusters")


class Server:
    """Ranks 0 and 1 on the first host, 2 and 3 on the second. ``jobs``: what was started, the one
    that leads first."""

    def __init__(self, hosts: Hosts, jobs: list[Job]) -> None:
        self.hosts = hosts
        self.jobs = jobs

    def ready(self) -> str:
        """Where it is reached from here."""
        found = re.search(r":(\d+)$", self.jobs[0].ready())
        assert found is not None
        return Relay(self.hosts, self.hosts.names[0], int(found[1])).url

    def process(self, rank: int, what: str) -> psutil.Process:
        """The supervisor or the worker of a rank."""
        found = [p for job in self.jobs for p in job.matching(what, rank)]
        return min(
            (p for p in found if p.name().startswith("python")), key=psutil.Process.create_time
        )

    def story(self) -> str:
        return "".join(f"\n=== {i}{job.story()}" for i, job in enumerate(self.jobs))

    def until(self, what: str, done: Callable[[], Any], limit_s: float) -> Any:
        try:
            return self.jobs[0].until(what, done, limit_s)
        except AssertionError as err:
            raise AssertionError(f"{what}{self.story()}") from err


def by_hand(hosts: Hosts, start: Start, script: list[str], secrets: Sequence[str]) -> list[Job]:
    """A command for each rank, as srun does it."""
    jobs = []
    for rank in range(4):
        env = {
            "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": hosts.addresses[0],
            "MASTER_PORT": "29517", "DS_CP_JOB_SECRET": secrets[rank],
        }  # fmt: skip
        argv = [sys.executable, *script]
        jobs.append(start(hosts.command(hosts.names[rank // 2], argv, ROOT), env))
    return jobs


def by_torchrun(hosts: Hosts, start: Start, script: list[str], secrets: Sequence[str]) -> list[Job]:
    """Its own store lets in everybody; ours has the next port."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    jobs = []
    for node, name in enumerate(hosts.names):
        argv = [torchrun, "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2"]
        argv += ["--master-addr", hosts.addresses[0], "--master-port", "29517", *script]
        jobs.append(start(hosts.command(name, argv, ROOT), {"DS_CP_JOB_SECRET": secrets[0]}))
    return jobs


def by_mpirun(hosts: Hosts, start: Start, script: list[str], secrets: Sequence[str]) -> list[Job]:
    """MPI hands a secret to all ranks."""
    argv = hosts.mpirun_argv([sys.executable, *script])
    return [start(hosts.command(hosts.names[0], argv, ROOT))]


@pytest.fixture
def serve(hosts: Hosts, start: Start, config: Write) -> Callable[..., Server]:
    def begin(
        launch: Callable[..., list[Job]] = by_hand,
        secrets: Sequence[str] = (SECRET,) * 4,
        **sections: Any,
    ) -> Server:
        file = config(kv_cache=KV, threads_per_rank=1, **sections)
        script = [str(ROOT / "launch" / "serve.py"), "--config", file]
        return Server(hosts, launch(hosts, start, script, secrets))

    return begin


def begun(server: Server, streams: list[Stream]) -> None:
    server.until("tokens", lambda: all(one.count >= 10 or one.errors for one in streams), 60)
    assert not streams[0].is_over, "it was over before it was disturbed"


def test_a_killed_worker_of_another_host_is_replaced(serve: Callable[..., Server]) -> None:
    """Every stream goes on with its tokens; rank 0's worker may die as well."""
    server = serve()
    url = server.ready()
    bodies = [GREEDY, SEEDED]
    expected = [Stream(url, body).end() for body in bodies]
    for number, rank in enumerate((3, 0), 1):
        streams = [Stream(url, body) for body in bodies]
        begun(server, streams)
        server.process(rank, "serve.worker_process").kill()
        for stream, want in zip(streams, expected, strict=True):
            assert stream.end() == want, server.story()
        said = f"all ranks have met again (generation {number}"
        server.until("its line", lambda: said in server.jobs[0].err, 60)  # noqa: B023
        print(rank, [round(stream.longest, 2) for stream in streams])
    server.process(0, "launch/serve.py").terminate()
    for job in server.jobs:
        server.until("its end", lambda: job.process.poll() is not None, 30)  # noqa: B023
        assert job.process.returncode == 0, server.story()


@pytest.mark.parametrize("launch", [by_torchrun, by_mpirun])
def test_under_launchers(launch: Callable[..., list[Job]], serve: Callable[..., Server]) -> None:
    if launch is by_mpirun:
        pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install ds_cp[mpi]")
    server = serve(launch)
    url = server.ready()
    expected = Stream(url, GREEDY).end()
    stream = Stream(url, GREEDY)
    begun(server, [stream])
    server.process(2, "serve.worker_process").kill()
    assert stream.end() == expected, server.story()
    errs = "".join(job.err for job in server.jobs)
    assert "the job has no secret" not in errs and "error" not in errs, server.story()


def test_rank_0s_supervisor_is_killed(serve: Callable[..., Server]) -> None:
    server = serve()
    url = server.ready()
    stream = Stream(url, GREEDY)
    begun(server, [stream])
    supervisor = server.process(0, "launch/serve.py")
    supervisor.kill()
    began = time.monotonic()
    server.until("all gone", lambda: not any(j.processes() for j in server.jobs), END_S)
    print("all ended in", round(time.monotonic() - began, 2))
    for rank, job in enumerate(server.jobs[1:], 1):
        assert job.process.wait(10) == 1
        said = [line for line in job.err.splitlines() if "error" in line]
        assert len(said) == (rank != 3), server.story()
        assert all("the supervisor of rank 0 (process" in line for line in said), said
        assert all("on nodea) was killed" in line for line in said), said


def test_another_supervisor_is_killed(serve: Callable[..., Server]) -> None:
    """Its worker dies with it, and the job ends with its name."""
    server = serve()
    server.ready()
    server.process(3, "launch/serve.py").kill()
    server.until("all gone", lambda: not any(j.processes() for j in server.jobs), END_S)
    said = [line for line in server.jobs[0].err.splitlines() if "error" in line]
    assert len(said) == 1 and "the supervisor of rank 3 (process" in said[0], server.story()
    assert "on nodeb) was killed" in said[0], said


def test_the_network_between_the_hosts_is_lost(serve: Callable[..., Server]) -> None:
    """Both sides know within two seconds, and end."""
    server = serve()
    url = server.ready()
    stream = Stream(url, GREEDY)
    begun(server, [stream])
    down = server.hosts.command("nodeb", ["ip", "link", "set", server.hosts.interface, "down"])
    assert psutil.Popen(down).wait() == 0
    began = time.monotonic()

    def said(rank: int) -> bool:
        return "did not answer for 1.2 s" in server.jobs[rank].err

    times: dict[int, float] = {}
    for rank in (0, 2):
        server.until("its line", lambda: said(rank), END_S)  # noqa: B023
        times[rank] = round(time.monotonic() - began, 2)
    print("known after", times)
    server.until("all gone", lambda: not any(j.processes() for j in server.jobs), END_S)
    print("all ended in", round(time.monotonic() - began, 2))
    assert "host nodeb of rank" in server.jobs[0].err, server.story()
    assert "host nodea of rank 0 did not answer" in server.jobs[2].err, server.story()


def test_a_short_loss_of_the_network_is_outlived(serve: Callable[..., Server]) -> None:
    """Where hosts are given the time for it, streams stand, and go on."""
    server = serve(fault_tolerance={"host_timeout_s": 60})
    url = server.ready()
    expected = Stream(url, GREEDY).end()
    stream = Stream(url, GREEDY)
    begun(server, [stream])
    link = ["ip", "link", "set", server.hosts.interface]
    assert server.hosts.run("nodeb", [*link, "down"]).returncode == 0
    time.sleep(2.0)
    assert not stream.is_over
    assert server.hosts.run("nodeb", [*link, "up"]).returncode == 0
    assert stream.end() == expected, server.story()
    print("the longest pause", round(stream.longest, 2))
    assert not any("warning" in job.err or "error" in job.err for job in server.jobs)


# Fills the link to argv[1] for argv[2] seconds, by as many connections as argv[3].
FLOOD = """
import socket, sys, threading, time
end = time.monotonic() + float(sys.argv[2])
def send():
    with socket.create_connection((sys.argv[1], 9), 10) as sock:
        sock.settimeout(2)
        while time.monotonic() < end:
            try:
                sock.send(bytes(1 << 16))
            except TimeoutError:
                pass
threads = [threading.Thread(target=send) for _ in range(int(sys.argv[3]))]
[t.start() for t in threads]
[t.join() for t in threads]
"""
SINK = """
import socket, threading
def drain(sock):
    while sock.recv(1 << 16):
        pass
server = socket.create_server(("", 9))
print("here", flush=True)
while True:
    threading.Thread(target=drain, args=(server.accept()[0],), daemon=True).start()
"""


def test_a_slow_and_full_link_is_no_loss(serve: Callable[..., Server]) -> None:
    """20 Mbit/s, with a queue of 0.4 s that bulk of others fills both ways."""
    server = serve()
    url = server.ready()
    expected = Stream(url, GREEDY).end()
    hosts, python = server.hosts, [sys.executable, "-u", "-c"]
    bucket = ["rate", "20mbit", "burst", "32kbit", "latency", "400ms"]
    for name in hosts.names:
        shape = ["tc", "qdisc", "add", "dev", hosts.interface, "root", "tbf", *bucket]
        done = hosts.run(name, shape)
        if done.returncode:
            pytest.skip(
                f"no token bucket here: {done.stdout}; with sch_tbf, as root: make clusters"
            )
        sink = hosts.popen(name, [*python, SINK])
        assert sink.stdout is not None and sink.stdout.readline() == "here\n"
    for name, address in zip(hosts.names, reversed(hosts.addresses), strict=True):
        hosts.popen(name, [*python, FLOOD, address, "12", "8"])
    stream = Stream(url, GREEDY)
    assert stream.end() == expected, server.story()
    time.sleep(5.0)
    assert not any("error" in job.err for job in server.jobs), server.story()


def test_a_rank_with_another_secret(serve: Callable[..., Server], tmp_path: Path) -> None:
    """It says so, and ends; rank 0 counts it, and goes on waiting for the right one."""
    server = serve(secrets=(SECRET, SECRET, SECRET, "f" * 32), comm={"timeout_s": 60})
    job = server.jobs[3]
    server.until("its end", lambda: job.process.poll() is not None, 60)
    assert job.process.returncode == 2, server.story()
    [line] = [line for line in job.err.splitlines() if "error" in line]
    assert "does not share the job's secret with rank 3" in line, line
    first = server.jobs[0]
    server.until("its line", lambda: "does not know the job's secret" in first.err, 10)
    assert first.process.poll() is None
