"""Every legal way to say where rank 0 is, on hosts that know their own names in different ways.

One process a host has imported everything and forks the ranks of each case, so a case takes a
fraction of a second: its ranks find the job, join it, and sum their numbers.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import ROOT, clean_environment
from tests.helpers.netns import Hosts, NamespaceError, hosts_text, two_hosts

pytestmark = pytest.mark.netns

JOIN_S = 20.0  # comm.timeout_s of a case: a rank that cannot join says so in this time
START_S = 120.0  # for the imports, on a busy machine

# Reads cases, one JSON line each, and answers one line a rank. ``agent``: the port on which this
# host's torchrun keeps its store, as torch's elastic agent does (on every address).
HOST = """
import gc, json, os, socket, sys, traceback
import torch, deepspeed.comm
from torch.distributed import TCPStore
from ds_cp.config import load_config
from ds_cp.errors import DsCpError
from ds_cp.startup.join import join_job
from ds_cp.startup.resources import socket_environment
from ds_cp.topology import detect

def say(**facts):
    os.write(1, (json.dumps(facts) + "\\n").encode())

def rank(case, env):
    os.environ.update(env)
    try:
        config = load_config({"model": "m", "comm": case["comm"]})
        job = detect(env, hosts=config.comm.hosts, interface=config.comm.interface)
        os.environ.update(socket_environment(job))
        world, _ = join_job(job, config)
        number = torch.tensor([float(1 + world.rank)])
        world.everybody.all_reduce(number, "test")
        say(rank=world.rank, sum=number.item(), hosts=world.topology.hosts,
            interface=job.interface, launcher=job.launcher)
        world.everybody.barrier()
    except DsCpError as err:
        say(error=str(err), kind=type(err).__name__)
    except BaseException:
        say(error=traceback.format_exc(), kind="traceback")
    os._exit(0)

torch.set_num_threads(1)
gc.freeze()  # else a collection in a rank copies every page
say(ready=socket.gethostname())
for line in sys.stdin:
    case = json.loads(line)
    socket.sethostname(case["hostname"])
    store = None
    if case["agent"]:
        store = TCPStore("0.0.0.0", case["agent"], is_master=True, wait_for_workers=False)
    children = []
    for env in case["ranks"]:
        pid = os.fork()
        if pid == 0:
            rank(case, env)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    del store
    say(done=True)
"""


class WarmHost:
    """The process of one host that forks ranks."""

    def __init__(self, hosts: Hosts, index: int, log: Path) -> None:
        self.name, self.log = hosts.names[index], log
        self._hosts_file = hosts.hosts_files[index]
        with log.open("wb") as err:
            self._process = subprocess.Popen(
                hosts.command(self.name, [sys.executable, "-c", HOST], ROOT),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                env=clean_environment() | {"OMP_NUM_THREADS": "1"},
            )
        self._read = b""

    def send(self, hosts_file: str, case: Mapping[str, Any]) -> None:
        """Start a case; its ranks answer to ``answers``."""
        self._hosts_file.write_text(hosts_file)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case).encode() + b"\n")
        self._process.stdin.flush()

    def answers(self) -> list[dict[str, Any]]:
        """What the ranks of the case said, once all have ended."""
        found = []
        while "done" not in (facts := self.line(3 * JOIN_S)):
            found.append(facts)
        return found

    def line(self, limit_s: float) -> dict[str, Any]:
        """The next JSON line of its stdout; libraries may print others."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        while True:
            line, end, rest = self._read.partition(b"\n")
            if end:
                self._read = rest
                if line.startswith(b"{"):
                    found: dict[str, Any] = json.loads(line)
                    return found
                continue
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            part = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            log = self.log.read_text(errors="replace")[-3000:]
            assert part, f"{self.name} said nothing within {limit_s:g} s\n{log}"
            self._read += part

    def close(self) -> None:
        """End it: it ends with its stdin. Kill would reach its parent alone, outside."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(two_hosts(bridge=True))
        except NamespaceError as err:
            pytest.skip(f"two hosts cannot be made here: {err}; run as root: pytest -m netns")
        yield found


@pytest.fixture(scope="module")
def warm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WarmHost]]:
    folder = tmp_path_factory.mktemp("contracts")
    found = [WarmHost(hosts, index, folder / f"host{index}") for index in range(2)]
    try:
        assert [host.line(START_S)["ready"] for host in found] == list(hosts.names)
        yield found
    finally:
        for host in found:
            host.close()


# --- what launchers say


@dataclass(frozen=True)
class Seat:
    """A rank of a job, as its launcher knows it: ``sizes[node]`` ranks on each host."""

    node: int
    local_rank: int
    sizes: tuple[int, ...]
    address: str
    port: int

    @property
    def rank(self) -> int:
        return sum(self.sizes[: self.node]) + self.local_rank

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def here(self) -> int:
        return self.sizes[self.node]

    def master(self) -> dict[str, Any]:
        return {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}

    def env(self) -> dict[str, Any]:
        """Set by hand, with one rank's number on its host but not how many there are."""
        place = {"RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_RANK": self.local_rank}
        return place | self.master()

    def env_with_local_size(self) -> dict[str, Any]:
        return self.env() | {"LOCAL_WORLD_SIZE": self.here}

    def deepspeed(self) -> dict[str, Any]:
        cross = {"CROSS_RANK": self.node, "CROSS_SIZE": len(self.sizes)}
        return self.env() | cross | {"LOCAL_SIZE": self.here}

    def torchrun(self) -> dict[str, Any]:
        """Static and c10d rendezvous alike: the store is the agent's, on rank 0's host."""
        elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return self.env_with_local_size() | elastic | {"GROUP_RANK": self.node}

    def torchrun_without_its_store(self) -> dict[str, Any]:
        return self.torchrun() | {"TORCHELASTIC_USE_AGENT_STORE": "False"}

    def torchrun_in_mpirun(self) -> dict[str, Any]:
        """mpirun started one torchrun a host."""
        outer = {"OMPI_COMM_WORLD_SIZE": len(self.sizes), "OMPI_COMM_WORLD_RANK": self.node}
        return self.torchrun() | outer

    def slurm(self) -> dict[str, Any]:
        nodes = ",".join(["nodea", "nodeb"][: len(self.sizes)])
        return {
            "SLURM_JOB_ID": self.port,
            "SLURM_STEP_ID": 0,
            "SLURM_PROCID": self.rank,
            "SLURM_NTASKS": self.size,
            "SLURM_LOCALID": self.local_rank,
            "SLURM_NODEID": self.node,
            "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, self.sizes)),
            "SLURM_STEP_NODELIST": nodes,
        }

    def slurm_with_master(self) -> dict[str, Any]:
        return self.slurm() | self.master()

    def slurm_without_counts(self) -> dict[str, Any]:
        found = self.slurm()
        del found["SLURM_STEP_TASKS_PER_NODE"]
        return found

    def slurm_with_pmix(self) -> dict[str, Any]:
        return self.slurm() | {"PMIX_RANK": self.rank, "PMI_SIZE": self.size}

    def open_mpi(self) -> dict[str, Any]:
        prefix = "OMPI_COMM_WORLD_"
        found = {"RANK": self.rank, "SIZE": self.size, "LOCAL_RANK": self.local_rank}
        found |= {"LOCAL_SIZE": self.here}
        return {prefix + name: value for name, value in found.items()} | self.master()

    def hydra(self) -> dict[str, Any]:
        local = {"MPI_LOCALRANKID": self.local_rank, "MPI_LOCALNRANKS": self.here}
        return {"PMI_RANK": self.rank, "PMI_SIZE": self.size} | local | self.master()

    def ds_cp(self) -> dict[str, Any]:
        return self.env_with_local_size() | {"DS_CP_LAUNCHER": "ds-cp"}

    def python(self) -> dict[str, Any]:
        return {}


Contract = Callable[[Seat], dict[str, Any]]
WITH_ADDRESS: tuple[Contract, ...] = (
    Seat.env,
    Seat.env_with_local_size,
    Seat.deepspeed,
    Seat.torchrun,
    Seat.torchrun_without_its_store,
    Seat.torchrun_in_mpirun,
    Seat.slurm_with_master,
    Seat.open_mpi,
    Seat.hydra,
)
WITHOUT_ADDRESS: tuple[Contract, ...] = (
    Seat.slurm,
    Seat.slurm_without_counts,
    Seat.slurm_with_pmix,
)
BY_ENVIRONMENT = (Seat.open_mpi, Seat.hydra)  # MPI itself is not asked: comm.hosts is env
STORE_OF_AGENT = (Seat.torchrun, Seat.torchrun_in_mpirun)

# What a host's own file says of its own name.
OWN_NAME: dict[str, Callable[[str, str, str], dict[str, str]]] = {
    "outward": lambda name, v4, v6: {v4: name},
    "127.0.0.1": lambda name, v4, v6: {"127.0.0.1": f"localhost {name}"},
    "127.0.1.1": lambda name, v4, v6: {"127.0.1.1": name},
    "::1": lambda name, v4, v6: {"127.0.0.1": f"localhost {name}", "::1": f"localhost {name}"},
    "both": lambda name, v4, v6: {"127.0.1.1": name, v4: name},
    "unknown": lambda name, v4, v6: {},
    "outward IPv6": lambda name, v4, v6: {v6: name},
}


def cases() -> Iterator[Any]:
    """(contract, ranks on each host, MASTER_ADDR, what hosts say of their own names)"""
    two, one = (2, 1), (2,)
    for contract in WITH_ADDRESS + WITHOUT_ADDRESS:
        # The others take the same way through the code as one of these.
        every = contract in (Seat.env, Seat.torchrun, Seat.slurm, Seat.open_mpi)
        for own in OWN_NAME if every else ("outward", "127.0.1.1"):
            yield contract, two, "nodea", own
        for own in ("127.0.1.1", "unknown") if every else ():
            yield contract, one, "nodea", own
        if every and contract is not Seat.slurm:
            for address in ("10.77.0.1", "fd77::1"):
                yield contract, two, address, "127.0.1.1"
            yield contract, one, "localhost", "127.0.1.1"
    for address in ("127.0.0.1", "::1", "10.77.0.1"):
        yield Seat.env, one, address, "127.0.1.1"
    yield Seat.ds_cp, one, "127.0.0.1", "127.0.1.1"
    yield Seat.python, (1,), "", "127.0.1.1"


def case_id(value: Any) -> str:
    return getattr(value, "__name__", str(value).replace(" ", ""))


def attempt(
    hosts: Hosts,
    warm: list[WarmHost],
    contract: Contract,
    sizes: tuple[int, ...],
    address: str,
    own: str,
    *,
    names: tuple[str, str] | None = None,
    comm: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run a case; what its ranks said, rank 0 first."""
    port = 20000 + next(PORTS)
    for node, size in enumerate(sizes):
        other = 1 - node
        entries = dict(OWN_NAME[own](hosts.names[node], *addresses_of(hosts, node)))
        v4, v6 = addresses_of(hosts, other)
        entries[v6 if own == "outward IPv6" else v4] = hosts.names[other]
        ranks = [contract(Seat(node, i, sizes, address, port)) for i in range(size)]
        case = {
            "ranks": [{name: str(value) for name, value in env.items()} for env in ranks],
            "hostname": (names or hosts.names)[node],
            "agent": port if contract in STORE_OF_AGENT and node == 0 else 0,
            "comm": {
                "hosts": "env" if contract in BY_ENVIRONMENT else "auto",
                "timeout_s": JOIN_S,
                **(comm or {}),
            },
        }
        warm[node].send(hosts_text(entries), case)
    found = [facts for host in warm[: len(sizes)] for facts in host.answers()]
    return sorted(found, key=lambda facts: int(facts.get("rank", 0)))


PORTS = itertools.count()


def addresses_of(hosts: Hosts, node: int) -> tuple[str, str]:
    return hosts.addresses[node], hosts.addresses_v6[node]


@pytest.mark.parametrize(("contract", "sizes", "address", "own"), list(cases()), ids=case_id)
def test_all_ranks_join(
    contract: Contract,
    sizes: tuple[int, ...],
    address: str,
    own: str,
    hosts: Hosts,
    warm: list[WarmHost],
) -> None:
    found = attempt(hosts, warm, contract, sizes, address, own)
    size = sum(sizes)
    assert [facts.get("sum") for facts in found] == [size * (size + 1) / 2] * size, found
    names = [name for name, n in zip(hosts.names, sizes, strict=False) for _ in range(n)]
    interface = hosts.interface if len(sizes) > 1 else "lo"
    for facts in found:
        assert facts["hosts"] == names
        if facts["interface"] != interface:  # not known to be one host: any that reaches itself
            assert len(sizes) == 1 and contract in (Seat.env, Seat.slurm_without_counts), facts


def test_hosts_of_one_name_are_two(hosts: Hosts, warm: list[WarmHost]) -> None:
    """Containers are often all called the same; a tensor-parallel group must not span them."""
    address, same = hosts.addresses[0], ("worker", "worker")
    found = attempt(hosts, warm, Seat.env, (2, 1), address, "outward", names=same)
    assert [facts.get("hosts") for facts in found] == [["worker", "worker", "worker#2"]] * 3, found


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "::1"])
@pytest.mark.parametrize(
    "contract", [Seat.env_with_local_size, Seat.deepspeed, Seat.slurm_with_master, Seat.open_mpi],
    ids=case_id,
)  # fmt: skip
def test_a_loopback_store_of_two_hosts_is_refused_at_once(
    contract: Contract, address: str, hosts: Hosts, warm: list[WarmHost]
) -> None:
    began = time.monotonic()
    found = attempt(hosts, warm, contract, (2, 1), address, "outward")
    assert time.monotonic() - began < JOIN_S
    assert [facts.get("kind") for facts in found] == ["TopologyError"] * 3, found
    for facts in found:
        assert f"MASTER_ADDR is {address}, which every host takes for itself" in facts["error"]
        assert "set MASTER_ADDR to an address of rank 0's host" in facts["error"]


def test_the_interface_of_the_config_is_where_rank_0_listens(
    hosts: Hosts, warm: list[WarmHost]
) -> None:
    """Its own name says nothing of the network, so the config decides."""
    comm = {"interface": hosts.interface}
    found = attempt(hosts, warm, Seat.env, (2, 1), "nodea", "127.0.1.1", comm=comm)
    assert [facts.get("sum") for facts in found] == [6.0] * 3, found
    comm = {"interface": "docker0", "timeout_s": 5.0}  # where no other host finds it
    found = attempt(hosts, warm, Seat.env, (1, 1), "nodea", "127.0.1.1", comm=comm)
    assert [facts.get("kind") for facts in found] == ["CommError"] * 2, found
    assert "(it listens on 172.17.0.1)" in "".join(facts["error"] for facts in found), found
