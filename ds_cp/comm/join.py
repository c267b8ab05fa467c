"""A process joins the job: where the ranks meet, what they tell each other, what they agree on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from ds_cp.comm import process_group
from ds_cp.comm.job_store import JobStore, open_job_store
from ds_cp.comm.process_group import DistError
from ds_cp.comm.shared_memory import Neighbours, Process
from ds_cp.comm.world import Backend, World
from ds_cp.errors import CommError, ConfigError, LaunchError
from ds_cp.link.knock import Port
from ds_cp.topology.hosts import Topology, name_hosts
from ds_cp.topology.net import host_key, listening_address

LEAST_PAUSE_S, MOST_PAUSE_S = 0.002, 0.05  # between looks at whether all have come


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one job meet.

    ``listen_fd`` is rank 0's listening socket (bound by the launch code, loopback for one-host
    jobs); the other ranks, and rank 0 of a job whose store exists already (torchrun), are clients.
    ``generation``: which meeting of these ranks it is; the keys of one are apart from the next.
    ``own``: the ranks of several hosts meet on a port of our own, which knows who is of the job.
    """

    host: str
    port: int
    listen_fd: int | None = None
    generation: int = 0
    own: Port | None = None


class Hello(msgspec.Struct, array_like=True):
    """What a rank says of itself. ``mark``: digest of its config; ``key``: alike on one host;
    ``gpu``: a word for its CUDA device, "" without one; ``cores``: those that it may use; ``born``:
    the first generation of its process."""

    mark: str
    key: str
    host: str
    pid: int
    namespace: str
    gpu: str = ""
    cores: tuple[int, ...] = ()
    born: int = 0


def join(
    rank: int,
    world_size: int,
    rendezvous: Rendezvous,
    *,
    host: str,
    hosts: Sequence[str] | None,
    device: torch.device,
    timeout_s: float,
    digest: str = "",
    backend: Literal["auto", "gloo", "nccl"] = "auto",
    shared_memory: bool = True,
    threads: int | None = None,
    arrive_s: float | None = None,
    born: int = 0,
    left: World | None = None,
    given_up: Callable[[], bool] = lambda: False,
    members: Sequence[int] | None = None,
    began: Sequence[str] | None = None,
) -> World:
    """Join the job and learn its hosts.

    ``host`` is this process's host name; ``hosts`` the host of every rank when the launch code
    knows it (MPI), else ``None`` and the names are exchanged through the store, where two hosts of
    one name get different ones. ``digest``: what all ranks must have in common (their config).
    ``backend``: see ``agree_on_backend``; ``shared_memory``: between ranks of a host, where it can
    be had; ``threads``: CPU threads of this rank, ``None`` for its share of the cores (the caller
    sets them, by ``World.threads``). A process is a rank of one job of several ranks at a time;
    jobs of one rank need no connections, so it may have any number of these. ``arrive_s``: seconds
    to wait for the others here, ``timeout_s`` where not given. In a later generation ``born`` is
    the first one of this process, and ``left`` the world that it was in, if it was in one;
    ``given_up`` says whether this meeting is not to be any more. ``members``: the ranks that meet,
    ascending, rank 0 among them, all where not given; ``began``: the host of every rank at the
    start.

    Raises ``CommError`` when not all ranks arrive in time, ``LaunchError`` when the store cannot
    listen or this process is in a job already, ``ConfigError`` when ranks were started differently
    or share a GPU under NCCL.
    """
    members = tuple(range(world_size) if members is None else members)
    several = len(members) > 1
    if several and process_group.in_a_job():
        raise LaunchError(
            f"rank {rank} of {world_size}: this process has joined a job already, by another "
            "engine or by torch.distributed itself: shut that engine down first "
            "(engine.shutdown()), call torch.distributed.destroy_process_group(), or make this "
            "engine in a process of its own"
        )
    try:
        keeps = left is not None and left.is_store  # the store, in which others wait already
        raw = left.raw_store if left is not None and keeps else None
        listen_fd = rendezvous.listen_fd if rank == 0 else None
        arrive_s = timeout_s if arrive_s is None else arrive_s
        if raw is None and rendezvous.own is not None:
            raw = open_job_store(rendezvous.own, listen_fd, timeout_s, arrive_s)
        elif raw is None:
            raw = process_group.open_store(rendezvous.host, rendezvous.port, listen_fd, arrive_s)
        # Who keeps torch's store has had its own connection to it from the first meeting on, and
        # that may have broken since.
        client: Any = raw
        if isinstance(raw, JobStore):
            raw.given_up = given_up  # so that torch, too, waits no more for who has died
        elif keeps:
            client = client.clone()
        store = process_group.prefixed(client, f"gen{rendezvous.generation}")
        hello = _hello(host, digest, device, born)

        def off() -> bool:
            if isinstance(raw, JobStore) and raw.misfit:
                raise ConfigError(raw.misfit)
            return given_up()

        hellos = _introduce(rank, members, hello, store, arrive_s, off)
        names = list(hosts or _names(hellos, began))
        try:
            _check_configs(hellos)
            chosen, notes = agree_on_backend(
                backend, [names[r] for r in members], [hellos[r].gpu for r in members]
            )
        except ConfigError:
            _stay_until_read(rank, members, store)
            raise
        if several:
            process_group.start(
                members.index(rank), len(members), store, device, chosen == "nccl", timeout_s
            )
        topology = Topology.from_hosts(names)
        near = [r for r in topology.ranks_on(topology.host_index(rank)) if r in hellos]
        processes = {r: Process(h.pid, h.namespace, h.key) for r, h in hellos.items()}
        here = [hellos[r] for r in near]
        cores, threads = cores_of(here), threads or share_of(hellos[rank], here)
        neighbours = (
            Neighbours(rank, near, processes, store, timeout_s, cores, threads)
            if shared_memory and several
            else None
        )
        mine = (hellos[rank].key, hellos[rank].gpu)
        world = World(
            rank, topology, device, timeout_s, joined=several, store=store, backend=chosen,
            neighbours=neighbours,
            sharing=sum((h.key, h.gpu) == mine for h in hellos.values()) if mine[1] else 1,
            cores=cores, threads=threads, left=left, members=members,
        )  # fmt: skip
        world.raw_store, world.is_store = raw, keeps or listen_fd is not None
        world.generation = rendezvous.generation
        world.born = tuple(hellos[r].born if r in hellos else -1 for r in range(world_size))
        if isinstance(raw, JobStore):
            raw.given_up = lambda: False
            if rank == 0:  # no rank reads those any more
                raw.forget(process_group.prefix_of(f"gen{rendezvous.generation - 2}") + "/")
        world.notes = [*notes, *_notes_of_all(world)]
    except BaseException as err:
        if several:
            process_group.leave()  # what was begun: this process may be asked again
        if not isinstance(err, RuntimeError | DistError):
            raise
        where = f"{rendezvous.host} port {rendezvous.port}"
        if rank == 0 and rendezvous.listen_fd is not None:
            where += f" (it listens on {listening_address(rendezvous.listen_fd)[0]})"
        raise CommError(
            f"rank {rank} of {world_size} could not join the others at {where} "
            f"within {arrive_s:g} s: {(str(err).splitlines() or [type(err).__name__])[0][:200]}"
        ) from err
    return world


def agree_on_backend(
    asked: Literal["auto", "gloo", "nccl"], hosts: Sequence[str], gpus: Sequence[str]
) -> tuple[Backend, list[str]]:
    """What carries the tensors of CUDA devices, and notes on it, from every rank's host and device
    ("" for the CPU).

    NCCL wants a device for each rank: "auto" takes gloo where ranks share one; "nccl" is a
    ``ConfigError`` then, and on the CPU. A job is all on the CPU or all on CUDA devices.
    """
    without = [rank for rank, gpu in enumerate(gpus) if not gpu]
    if without and len(without) < len(gpus):
        raise ConfigError(
            f"ranks {without[:8]} compute on the CPU and the others on CUDA devices: "
            "set device to cpu, or start ranks only where there is a GPU"
        )
    if without:
        if asked == "nccl":
            raise ConfigError(
                "comm.backend nccl moves tensors of CUDA devices, but the ranks compute on the "
                "CPU: set comm.backend to auto"
            )
        return "gloo", []
    if asked == "gloo":
        return "gloo", []
    for host in dict.fromkeys(hosts):
        here = [gpu for gpu, name in zip(gpus, hosts, strict=True) if name == host]
        if (number := len(set(here))) < len(here):
            what = f"{len(here)} ranks on {number} GPU{'s' * (number != 1)}"
            if asked == "nccl":
                raise ConfigError(
                    f"comm.backend nccl needs one GPU for each rank, but host {host} has {what}: "
                    "start fewer ranks, or set comm.backend to gloo"
                )
            note = f"host {host} has {what}: they exchange by gloo, since NCCL needs one for each"
            return "gloo", [note]
    return "nccl", []


def _hello(host: str, digest: str, device: torch.device, born: int) -> Hello:
    return Hello(
        hashlib.sha256(digest.encode()).hexdigest(), host_key(), host, os.getpid(),
        _pid_namespace(), _gpu(device), tuple(sorted(os.sched_getaffinity(0))), born,
    )  # fmt: skip


def _introduce(
    rank: int, members: Sequence[int], mine: Hello, store: Any, arrive_s: float,
    given_up: Callable[[], bool],
) -> dict[int, Hello]:  # fmt: skip
    """Publish what this rank says of itself; returns what each of ``members`` says, in order."""
    store.set(f"hello/{rank}", msgspec.json.encode(mine).decode())
    keys = [f"hello/{r}" for r in members]
    limit, pause_s = time.monotonic() + arrive_s, LEAST_PAUSE_S
    while not store.check(keys):  # a wait with a time limit writes warnings
        if time.monotonic() >= limit or given_up():
            missing = [r for r, key in zip(members, keys, strict=True) if not store.check([key])]
            raise RuntimeError(f"ranks {missing[:8]} did not come")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MOST_PAUSE_S)
    said = [msgspec.json.decode(store.get(key), type=Hello) for key in keys]
    return dict(zip(members, said, strict=True))


def cores_of(hellos: Sequence[Hello]) -> int:
    """Cores that these ranks of one host may use together: launchers may bind each to its own."""
    return len({core for hello in hellos for core in hello.cores})


def share_of(mine: Hello, hellos: Sequence[Hello]) -> int:
    """CPU threads for one rank of a host, at least 1: its cores over the ranks, itself among them,
    that may use some of these. A launcher may have bound it to cores of its own."""
    cores = set(mine.cores)
    return max(1, len(cores) // max(1, sum(not cores.isdisjoint(h.cores) for h in hellos)))


def _names(hellos: Mapping[int, Hello], began: Sequence[str] | None) -> list[str]:
    """A name for the host of each rank: those at the start, if those who are here are spread over
    hosts as they were then; who is away is where it was."""
    hosts = [(hello.host, hello.key) for hello in hellos.values()]
    named = name_hosts([hosts.index(own) for own in hosts], [name for name, _ in hosts])
    if began is None:
        return list(named)
    then = [began[rank] for rank in hellos]
    if len(set(zip(hosts, then, strict=True))) == len(set(hosts)) == len(set(then)):
        return list(began)
    now = dict(zip(hellos, named, strict=True))
    return [now.get(rank, name) for rank, name in enumerate(began)]


def _check_configs(hellos: Mapping[int, Hello]) -> None:
    odd = [r for r, hello in hellos.items() if hello.mark != hellos[0].mark]
    if odd:
        raise ConfigError(
            f"ranks {odd[:8]} were started with another config than rank 0: "
            "start every rank with the same file and options"
        )


def _stay_until_read(rank: int, members: Sequence[int], store: Any) -> None:
    """Rank 0 is the store: it must stay until the other ranks have read what all said."""
    store.set(f"read/{rank}", "")
    if rank == 0:
        store.wait([f"read/{r}" for r in members])


def _notes_of_all(world: World) -> list[str]:
    """What each host says of its shared memory, on every rank, in the order of the hosts."""
    if len(world.members) == 1:
        return []
    leaders = list({world.topology.host_index(r): r for r in reversed(world.members)}.values())
    leaders.sort()
    if world.rank in leaders:
        world.store.set(f"notes/{world.rank}", "\n".join(world.notes))
    said = [world.store.get(f"notes/{leader}").decode() for leader in leaders]
    world.everybody.barrier()  # rank 0, whose end is the store's, may leave at once
    return [line for text in said for line in text.splitlines()]


def _pid_namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return f"of process {os.getpid()}"  # nobody else's


def _gpu(device: torch.device) -> str:
    """A word for a CUDA device that two ranks share only when it is the same one."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", "") or device.index)
