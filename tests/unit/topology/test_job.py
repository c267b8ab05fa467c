from __future__ import annotations

import errno
import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ds_cp.errors import LaunchError, TopologyError
from ds_cp.topology import Job, detect, hosts, mpi, net, open_store_socket, peek_rank
from ds_cp.topology.net import Address
from ds_cp.topology.slurm import expand_nodelist, expand_tasks_per_node, step_port

HOST = socket.gethostname()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def detected(env: dict[str, str], **options: Any) -> Iterator[Job]:
    job = detect(env, **options)
    try:
        yield job
    finally:
        if job.store_socket is not None:
            job.store_socket.close()


def deepspeed_env(rank: int, size: int = 4, local: int = 4, **more: str) -> dict[str, str]:
    env = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_SIZE": str(local),
        "CROSS_RANK": str(rank // local),
        "CROSS_SIZE": str(size // local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    return env | more


# --- one host


def test_plain_python_is_one_rank() -> None:
    with detected({}) as job:
        assert (job.rank, job.world_size, job.local_rank, job.local_world_size) == (0, 1, 0, 1)
        assert job.hosts == (HOST,) and job.host == HOST and job.launcher == "python"
        assert job.store_socket is not None
        assert job.store_socket.getsockname() == ("127.0.0.1", job.store_port)
        with socket.create_connection((job.store_host, job.store_port), timeout=5):
            pass


def test_deepspeed_on_one_host() -> None:
    port = str(free_port())
    with detected(deepspeed_env(0, MASTER_PORT=port, MASTER_ADDR="10.1.2.3")) as job:
        assert job.launcher == "deepspeed" and job.hosts == (HOST,) * 4 and job.one_host
        assert (job.store_host, job.store_port) == ("127.0.0.1", int(port))
        assert job.store_socket is not None
        assert job.store_socket.getsockname() == ("127.0.0.1", int(port))
        with detected(deepspeed_env(3, MASTER_PORT=port)) as other:
            assert other.store_socket is None and other.rank == other.local_rank == 3
            assert (other.store_host, other.store_port) == (job.store_host, job.store_port)
        loopback = [a.interface for a in net.local_addresses() if a.ip == "127.0.0.1"]
        assert job.interface == loopback[0]


def test_deepspeed_with_one_rank_needs_no_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with detected(deepspeed_env(0, 1, 1, MASTER_PORT=port)) as job:
            assert job.launcher == "deepspeed" and job.store_port != int(port)


def test_the_store_cannot_be_reached_from_outside() -> None:
    outside = [a.ip for a in net.local_addresses() if not a.is_loopback]
    if not outside:
        pytest.skip("this machine has no address but loopback")
    with detected({}) as job, pytest.raises(OSError):
        socket.create_connection((outside[0], job.store_port), timeout=2)


def torchrun_env(rank: int, size: int, local: int, **more: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    } | more


def test_torchrun_shares_its_store() -> None:
    with detected(torchrun_env(0, 2, 2)) as job:
        assert job.launcher == "torchrun" and job.store_shared and job.store_socket is None
        assert (job.store_host, job.store_port) == ("localhost", 29511)
        assert job.hosts == (HOST, HOST)


def test_several_hosts_meet_on_a_port_of_our_own() -> None:
    """torchrun's store lets in everybody; ours is on the next port, or the one that is named."""
    for options, port in (({}, 29512), ({"port": 30111}, 30111)):
        env = torchrun_env(3, 4, 2, MASTER_ADDR="192.0.2.7", DS_CP_JOB_SECRET="s" * 16)
        with detected(env, **options) as job:
            assert job.by_port and not job.store_shared and job.secret == b"s" * 16
            assert (job.store_host, job.store_port) == ("192.0.2.7", port)
            assert "ssss" not in repr(job)
    with detected(torchrun_env(1, 2, 2), port=30111) as job:  # one host
        assert not job.by_port and job.store_port == 29511


def test_torchrun_without_its_store() -> None:
    env = torchrun_env(0, 2, 2, TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(free_port()))
    with detected(env) as job:
        assert not job.store_shared and job.store_socket is not None
        assert job.store_host == "127.0.0.1"


def test_our_own_launcher() -> None:
    env = deepspeed_env(1, DS_CP_LAUNCHER="ds-cp", OMPI_COMM_WORLD_SIZE="1")
    with detected(env) as job:
        assert job.launcher == "ds-cp" and job.world_size == 4


# --- several hosts


@pytest.fixture
def listened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Make this a host with two networks; records where listening was asked for."""
    addresses = (
        Address("lo", "127.0.0.1", 8),
        Address("docker0", "172.17.0.1", 16),
        Address("eth0", "192.0.2.5", 24),
        Address("ib0", "198.51.100.5", 24),
    )
    calls: list[tuple[str, int]] = []

    def listen(ip: str, port: int, way_out: str) -> socket.socket:
        calls.append((ip, port))
        return socket.create_server(("127.0.0.1", 0))

    def route_to(ip: str, own: Any) -> Address | None:
        near = [a for a in own if ip.rsplit(".", 1)[0] == a.ip.rsplit(".", 1)[0]]
        return near[0] if near else None

    monkeypatch.setattr(net, "local_addresses", lambda: addresses)
    monkeypatch.setattr(net, "listen", listen)
    monkeypatch.setattr(net, "route_to", route_to)
    return calls


def test_deepspeed_over_two_hosts(listened: list[tuple[str, int]]) -> None:
    with detected(deepspeed_env(0, 4, 2, MASTER_ADDR="192.0.2.5")) as job:
        assert job.hosts is None and not job.one_host and job.local_world_size == 2
        assert listened == [("192.0.2.5", 29500)]  # never on all interfaces
        assert job.store_host == "192.0.2.5" and job.interface == "eth0"
    with detected(deepspeed_env(3, 4, 2, MASTER_ADDR="198.51.100.9")) as job:
        assert job.local_rank == 1 and job.store_socket is None and job.interface == "ib0"
    with detected(deepspeed_env(3, 4, 2, MASTER_ADDR="192.0.2.9"), interface="ib0") as job:
        assert job.interface == "ib0"
    assert len(listened) == 1


def test_own_name_that_resolves_to_loopback(
    listened: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "resolve", lambda name: ("127.0.1.1",))
    with detected(deepspeed_env(0, 4, 2, MASTER_ADDR="nodea"), interface="eth0") as job:
        assert listened == [("192.0.2.5", 29500)] and job.interface == "eth0"


def test_store_on_a_foreign_address(listened: list[tuple[str, int]]) -> None:
    with pytest.raises(LaunchError, match=r"192\.0\.2\.77.*eth0 192\.0\.2\.5.*MASTER_ADDR"):
        detect(deepspeed_env(0, 4, 2, MASTER_ADDR="192.0.2.77"))


def test_unknown_interface(listened: list[tuple[str, int]]) -> None:
    with pytest.raises(TopologyError, match=r"'eth7' is not up.*eth0 192\.0\.2\.5"):
        detect(deepspeed_env(1, 4, 2, MASTER_ADDR="192.0.2.5"), interface="eth7")


def test_a_kernel_without_ipv6_has_no_route_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ipv6.disable=1 the socket itself is refused; a cluster may have no default route."""
    real = socket.socket

    def refused(family: int, *rest: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *rest)

    addresses = (Address("lo", "127.0.0.1", 8), Address("eth0", "192.0.2.5", 24))
    monkeypatch.setattr(net.socket, "socket", refused)
    assert net.route_to("2001:db8::1", addresses) is None
    assert net.outward_address(addresses, ["2001:db8::7"]) == addresses[1]


def test_address_that_all_hosts_share_is_left_out() -> None:
    bridge = Address("docker0", "172.17.0.1", 16)
    mine = [bridge, Address("eth0", "10.0.0.1", 24), Address("ib0", "10.9.0.1", 24)]
    other = [bridge, Address("eth0", "10.1.0.2", 24), Address("ib0", "10.9.0.2", 24)]
    found = net.shared_address(mine, [other])
    assert found is not None and found.ip == "10.9.0.1"  # the only common subnet
    found = net.shared_address(mine, [[bridge, Address("eth0", "10.1.0.2", 24)]])
    assert found is not None and found.ip == "10.0.0.1"
    assert net.shared_address([bridge], [[bridge]]) is None


# --- Slurm


def slurm_env(rank: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "5",
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_NODEID": str(rank // 2),
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "node[01-03]",
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.200",
    } | more


def test_slurm_over_three_nodes(
    listened: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "resolve", lambda name: {"node01": ("192.0.2.5",)}[name])
    ports = set()
    for rank, local_size in enumerate([2, 2, 2, 2, 1]):
        with detected(slurm_env(rank)) as job:
            assert job.launcher == "slurm" and job.rank == rank and job.world_size == 5
            assert job.local_rank == rank % 2 and job.local_world_size == local_size
            assert job.hosts is None and job.store_host == "node01"
            if rank:
                ports.add(job.store_port)
    assert listened == [("192.0.2.5", *ports)]
    assert 20000 <= ports.pop() <= 29999


def test_slurm_on_one_node() -> None:
    env = slurm_env(1, SLURM_NTASKS="2", SLURM_STEP_TASKS_PER_NODE="2", SLURM_NODEID="0")
    with detected(env) as job:
        assert job.hosts == (HOST, HOST) and job.store_host == "127.0.0.1"
        assert job.store_port == step_port(4242, 0)


def test_slurm_step_of_an_srun_with_pmi_does_not_ask_mpi() -> None:
    env = slurm_env(1, SLURM_NTASKS="2", SLURM_STEP_TASKS_PER_NODE="2", SLURM_NODEID="0")
    with detected(env | {"PMIX_RANK": "1", "PMI_SIZE": "2"}) as job:
        assert job.launcher == "slurm"


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # salloc's shell
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # sbatch's script
        # salloc with an interactive step
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_ID": str(0xFFFFFFFA)},
    ],
)
def test_inside_an_allocation_plain_python_is_one_rank(env: dict[str, str]) -> None:
    with detected(env) as job:
        assert job.world_size == 1 and job.launcher == "python"


def test_expand_nodelist() -> None:
    assert expand_nodelist("node[01-03,07],gpu5") == (
        *("node01", "node02", "node03", "node07"),
        "gpu5",
    )
    assert expand_nodelist("r[1-2]n[9-10]") == ("r1n9", "r1n10", "r2n9", "r2n10")
    assert expand_nodelist("tux[0-1]-ib.x") == ("tux0-ib.x", "tux1-ib.x")
    assert expand_nodelist("alone") == ("alone",)
    for bad in ("", "a[", "a]", "a[1-", "a[2-1]", "a,,b", "a[x]", "a[[1]]", "a[0-999999999]"):
        with pytest.raises(TopologyError, match="node list"):
            expand_nodelist(bad)


def test_slurm_local_size_from_the_nodes() -> None:
    env = slurm_env(1, SLURM_NTASKS="4", MASTER_ADDR="192.0.2.5", MASTER_PORT="4000")
    del env["SLURM_STEP_TASKS_PER_NODE"]
    for more, local_size in (
        ({}, None),
        ({"SLURM_NNODES": "1"}, 4),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "3"}, None),  # not all nodes are full
    ):
        with detected(env | more) as job:
            assert job.local_world_size == local_size


def test_expand_tasks_per_node() -> None:
    assert expand_tasks_per_node("2(x2),1") == (2, 2, 1)
    assert expand_tasks_per_node("16") == (16,)
    with pytest.raises(TopologyError, match="tasks per node"):
        expand_tasks_per_node("2(x2")


# --- MPI, with a stand-in for the session; tests/dist runs the real one


class FakeSession:
    """What rank ``rank`` would see: ``gather`` takes the others' texts from a script."""

    def __init__(self, facts: mpi.MpiFacts, others: dict[int, dict[str, Any]]) -> None:
        self.facts = facts
        self.others = others

    def gather(self, text: str) -> list[str]:
        mine = {self.facts.rank: json.loads(text)}
        return [json.dumps((self.others | mine)[rank]) for rank in range(self.facts.size)]

    def broadcast(self, text: str) -> str:
        return text


@pytest.fixture
def fake_mpi(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(size: int, hosts: str, others: dict[int, dict[str, Any]] | None = None) -> None:
        facts = mpi.MpiFacts(0, size, tuple(hosts), 0, hosts.count(hosts[0]))
        entries = others or {rank: {"addresses": []} for rank in range(size)}

        @contextmanager
        def session(timeout_s: float) -> Iterator[FakeSession]:
            yield FakeSession(facts, entries)

        monkeypatch.setattr(mpi, "session", session)

    return install


def test_mpi_on_one_host(fake_mpi: Any) -> None:
    fake_mpi(4, "aaaa")
    with detected({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}) as job:
        assert job.launcher == "mpi" and job.hosts == ("a",) * 4 and job.local_world_size == 4
        assert job.store_socket is not None
        assert job.store_socket.getsockname() == ("127.0.0.1", job.store_port)


def test_mpi_over_two_hosts(fake_mpi: Any, listened: list[tuple[str, int]]) -> None:
    there = {"addresses": [["docker0", "172.17.0.1", 16], ["ib0", "198.51.100.6", 24]]}
    fake_mpi(4, "aabb", {1: {"addresses": []}, 2: there, 3: there})
    with detected({"OMPI_COMM_WORLD_SIZE": "4"}) as job:
        assert job.store_host == "198.51.100.5" and job.interface == "ib0"
        assert job.hosts == ("a", "a", "b", "b") and job.local_world_size == 2
    with detected({"OMPI_COMM_WORLD_SIZE": "4"}, interface="eth0") as job:
        assert job.store_host == "192.0.2.5" and job.interface == "eth0"
    with detected({"PMI_SIZE": "4", "MASTER_ADDR": "192.0.2.5", "MASTER_PORT": "4567"}) as job:
        assert job.store_host == "192.0.2.5"
    assert listened == [("198.51.100.5", 0), ("192.0.2.5", 0), ("192.0.2.5", 4567)]


def test_mpi_another_rank_s_error_is_raised_by_all(fake_mpi: Any) -> None:
    fake_mpi(2, "ab", {1: {"error": "comm.interface 'ib0' is not up on host b"}})
    with pytest.raises(TopologyError, match="on host b"):
        detect({"OMPI_COMM_WORLD_SIZE": "2"})


def test_mpi_size_disagrees(fake_mpi: Any) -> None:
    fake_mpi(2, "aa")
    with pytest.raises(TopologyError, match=r"4 ranks.*MPI sees 2.*mpirun -np 4"):
        detect(deepspeed_env(0) | {"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(TopologyError, match=r"4 ranks.*MPI sees 2"):
        detect({"WORLD_SIZE": "4", "RANK": "0"}, hosts="mpi")
    with pytest.raises(TopologyError, match=r"RANK=1 but MPI says rank 0"):
        detect({"WORLD_SIZE": "2", "RANK": "1"}, hosts="mpi")
    fake_mpi(1, "a")
    message = (
        "the job has 4 ranks but MPI sees 1: launch with mpirun -np 4 ..., "
        "or set comm.hosts to auto"
    )
    with pytest.raises(TopologyError, match=re.escape(message)):
        detect(deepspeed_env(0), hosts="mpi")
    with pytest.raises(TopologyError, match="5 ranks but MPI sees 1"):
        detect(slurm_env(0), hosts="mpi")


def test_mpi4py_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(TopologyError, match=r'pip install "ds_cp\[mpi\]"'):
        detect({"OMPI_COMM_WORLD_SIZE": "2"})


def test_mpirun_s_variables_without_mpi() -> None:
    open_mpi = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    hydra = {
        "PMI_RANK": "1",
        "PMI_SIZE": "2",
        "MPI_LOCALRANKID": "1",
        "MPI_LOCALNRANKS": "2",
    }
    for env in (open_mpi, hydra):
        with pytest.raises(TopologyError, match="MASTER_ADDR"):
            detect(env, hosts="env")
        with detected(env | {"MASTER_ADDR": "h", "MASTER_PORT": "4000"}, hosts="env") as job:
            assert (job.rank, job.world_size, job.local_rank) == (1, 2, 1)
            assert (job.store_host, job.store_port) == ("127.0.0.1", 4000)


def test_hosts_from_shared_memory_groups() -> None:
    assert hosts.name_hosts([0, 0, 2, 2], ["a", "lie", "b", "b"]) == ("a", "a", "b", "b")
    assert hosts.name_hosts([0, 1, 0, 3], ["c", "c", "c", "c"]) == ("c", "c#2", "c", "c#3")


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE must be a whole number .got 'four'."),
        ({"RANK": ""}, "RANK must be a whole number"),
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"RANK": "-1"}, "rank -1 of 4"),
        ({"WORLD_SIZE": "0"}, "rank 0 of 0"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"LOCAL_SIZE": "9"}, "local rank 0 of 9 in a job of 4"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be a port"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT must be a whole number"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is not set"),
    ],
)
def test_garbage(change: dict[str, str], message: str) -> None:
    with pytest.raises(TopologyError, match=message) as error:
        detect(deepspeed_env(0) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_missing_variable(name: str) -> None:
    env = deepspeed_env(0)
    del env[name]
    with pytest.raises(TopologyError, match=name):
        detect(env)


def test_unknown_source() -> None:
    with pytest.raises(TopologyError, match="auto, mpi or env"):
        detect({}, hosts="dns")


def test_port_in_use_names_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(LaunchError, match=rf"port {port} .*--master_port N"):
            detect(deepspeed_env(0, MASTER_PORT=port))
        env = {k: v for k, v in deepspeed_env(0, MASTER_PORT=port).items() if "_SIZE" not in k}
        env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        with pytest.raises(LaunchError, match=rf"port {port} .*MASTER_PORT=N"):
            detect(env)
        with detected(deepspeed_env(1, MASTER_PORT=port)) as job:
            other = open_store_socket(job, port=0)  # any free one
            assert other.getsockname()[0] == "127.0.0.1"
            other.close()


def test_unresolvable_store() -> None:
    with pytest.raises(LaunchError, match="cannot be resolved"):
        net.resolve("no such host.invalid")


def test_peek_rank() -> None:
    assert peek_rank({}) == 0
    assert peek_rank({"RANK": "3"}) == 3
    assert peek_rank({"RANK": "x"}) == 0
    assert peek_rank({"OMPI_COMM_WORLD_RANK": "2"}) == 2
    assert peek_rank({"PMI_RANK": "1"}) == 1
    assert peek_rank(slurm_env(4)) == 4
    assert peek_rank({"SLURM_PROCID": "4"}) == 0
