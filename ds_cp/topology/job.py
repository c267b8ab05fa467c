"""What the launcher says: this rank's place in the job, and where rank 0's store listens."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ds_cp.errors import LaunchError, TopologyError
from ds_cp.topology import environment, mpi, net
from ds_cp.topology.environment import Place, peek_rank
from ds_cp.topology.meeting import interface_of, meeting, named_address, own_ip
from ds_cp.topology.net import LOOPBACK, Address
from ds_cp.topology.secret import find_secret

__all__ = ["Job", "detect", "open_store_socket", "peek_rank"]

# How to choose another port, by launcher.
_OTHER_PORT = {
    "deepspeed": "choose another port with deepspeed --master_port N",
    "torchrun": "choose another port with torchrun --master-port N",
}
_ANY_OTHER_PORT = "choose another port with MASTER_PORT=N in the environment"


@dataclass(frozen=True)
class Job:
    """One rank's view of the job, before any rank has talked to another (except through MPI).

    ``hosts`` is the host of each rank, or ``None`` until the ranks exchange ``host``.
    ``store_shared``: a store listens at ``store_host:store_port`` already, every rank is a client.
    Otherwise rank 0 has ``store_socket``, bound and listening there: on loopback when the job is on
    one host. ``interface``: network interface for the job's own traffic (``lo`` on one host), or
    ``None`` where no interface has an address.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    hosts: tuple[str, ...] | None
    host: str
    launcher: str  # python, deepspeed, torchrun, slurm, mpi, ds-cp, kubernetes
    store_host: str
    store_port: int
    store_shared: bool = False
    interface: str | None = None
    store_socket: socket.socket | None = field(default=None, compare=False, repr=False)
    secret: bytes = field(default=b"", compare=False, repr=False)  # of the job, empty for none

    @property
    def one_host(self) -> bool:
        """Whether all ranks are known to be on one host."""
        if self.hosts is not None:
            return len(set(self.hosts)) == 1
        return self.local_world_size == self.world_size

    @property
    def by_port(self) -> bool:
        """Whether rank 0's port is one of our own (``link.door``), since hosts meet there; ranks of
        one host use torch's store, on loopback, or their launcher's."""
        return self.world_size > 1 and not self.one_host


def detect(
    env: Mapping[str, str],
    *,
    hosts: str = "auto",
    interface: str = "auto",
    timeout_s: float = 120.0,
    port: int | Literal["auto"] = "auto",
    secret_file: str | None = None,
) -> Job:
    """The job that this process is a rank of. Rank 0 comes back with its store's socket open.

    ``hosts``: ``auto`` asks MPI when mpirun started us and the launcher's environment otherwise;
    ``mpi`` and ``env`` ask that one alone. Of the environment, ``RANK`` / ``WORLD_SIZE``
    (deepspeed, torchrun, ds-cp, an Indexed Job) come before Slurm's step and mpirun's own; with
    none of them it is a job of one rank. ``interface``: a network interface's name, or ``auto``.
    ``timeout_s`` bounds the wait for the other ranks where MPI is asked (see ``mpi.session``), and
    for the name of rank 0's pod, which Kubernetes knows once that has an address.
    ``port``: rank 0's, where several hosts are to meet on another one than the launcher's;
    ``secret_file``: see ``find_secret``. Under MPI, where no rank has a secret, rank 0 makes one.

    Raises ``TopologyError`` when the sources disagree or a value makes no sense, ``LaunchError``
    when the store cannot listen, or the secret is none.
    """
    secret, wanted = find_secret(env, secret_file), None if port == "auto" else port
    if hosts not in ("auto", "mpi", "env"):
        raise TopologyError(f"comm.hosts must be auto, mpi or env (got {hosts!r})")
    if hosts == "mpi":
        return _from_mpi(env, interface, timeout_s, wanted, secret)
    by_rank = environment.launcher_by_rank(env) is not None
    if hosts == "auto" and not by_rank and mpi.launched_by_mpirun(env):
        # Before MPI starts: it would wait for ranks that are not there.
        _check_sizes(environment.mpirun_size(env), env)
        return _from_mpi(env, interface, timeout_s, wanted, secret)
    if "RANK" in env or "WORLD_SIZE" in env:
        place = environment.from_rank_variables(env)
        if place.launcher == "kubernetes" and place.rank != 0:
            net.await_name(place.store_host, timeout_s)
    elif environment.in_slurm_step(env):
        place = environment.from_slurm(env)
    elif hosts == "env" and mpi.launched_by_mpi(env):
        place = environment.from_mpirun_variables(env)
    else:
        place = Place(0, 1, 0, 1, "python")
    return replace(_complete(_at_port(place, wanted), interface), secret=secret)


def _at_port(place: Place, port: int | None) -> Place:
    """The place, of several hosts on a port of their own: a launcher's store lets in everybody."""
    if place.local_size == place.size:
        return place
    if place.store_shared:
        return replace(place, store_shared=False, store_port=port or place.store_port + 1)
    return place if port is None else replace(place, store_port=port)


def open_store_socket(job: Job, *, port: int | None = None) -> socket.socket:
    """A listening socket for rank 0's store, at ``job.store_port`` unless ``port`` says another.

    Bound to loopback for a job on one host, else to the one address that the other hosts use.
    ``LaunchError`` when the port is in use or the address is not this host's.
    """
    ip = LOOPBACK
    if not job.one_host:
        addresses = net.local_addresses()
        named = named_address(job.interface or "auto", addresses, job.host)
        ip = own_ip(job.store_host, named, addresses, job.host)
    way_out = _OTHER_PORT.get(job.launcher, _ANY_OTHER_PORT)
    return net.listen(ip, job.store_port if port is None else port, way_out)


# --- MPI


def _from_mpi(
    env: Mapping[str, str], interface: str, timeout_s: float, wanted: int | None, secret: bytes
) -> Job:
    """Ask MPI. Every rank enters every exchange, and errors travel in them, so that all ranks
    raise the same one and none waits for a rank that has left."""
    with mpi.session(timeout_s) as session:
        facts = session.facts
        host = facts.hosts[facts.rank]
        mine: dict[str, object]
        try:
            addresses = net.local_addresses()
            port = _check_mpi_rank(facts, env, interface, addresses, host)
            mine = {"addresses": [[a.interface, a.ip, a.prefix] for a in addresses]}
            mine["secret"] = bool(secret)
        except TopologyError as err:
            mine = {"error": str(err)}
        everyone = [json.loads(text) for text in session.gather(json.dumps(mine))]
        for entry in everyone:
            if "error" in entry:
                raise TopologyError(entry["error"])

        one_host = len(set(facts.hosts)) == 1
        sock: socket.socket | None = None
        store: dict[str, object] = {}
        if facts.rank == 0:
            try:
                ip = LOOPBACK
                if not one_host:
                    others = [
                        [Address(*entry) for entry in everyone[rank]["addresses"]]
                        for rank in range(facts.size)
                        if facts.hosts[rank] != host
                    ]
                    ip = _mpi_store_ip(env, interface, addresses, others, host)
                    port = port if wanted is None else wanted
                sock = net.listen(ip, port, _ANY_OTHER_PORT)
                store = {"ip": ip, "port": sock.getsockname()[1]}
                if not (one_host or any(entry.get("secret") for entry in everyone)):
                    store["secret"] = secrets.token_hex(32)  # travels by MPI's own connections
            except (LaunchError, TopologyError) as err:
                store = {"error": str(err)}
        store = json.loads(session.broadcast(json.dumps(store)))
        if "error" in store:
            raise LaunchError(str(store["error"]))
    return Job(
        rank=facts.rank,
        world_size=facts.size,
        local_rank=facts.local_rank,
        local_world_size=facts.local_size,
        hosts=facts.hosts,
        host=host,
        launcher="mpi",
        store_host=str(store["ip"]),
        store_port=int(str(store["port"])),
        interface=interface_of(interface, one_host, str(store["ip"]), addresses, host),
        store_socket=sock,
        secret=str(store["secret"]).encode() if "secret" in store else secret,
    )


def _check_mpi_rank(
    facts: mpi.MpiFacts,
    env: Mapping[str, str],
    interface: str,
    addresses: tuple[Address, ...],
    host: str,
) -> int:
    """Compare MPI with the environment; the port asked for (0: any) when they agree."""
    _check_sizes(facts.size, env)
    rank = environment.whole_number(env, "RANK")
    if rank is not None and rank != facts.rank:
        raise TopologyError(
            f"the environment says RANK={rank} but MPI says rank {facts.rank}: "
            f"unset RANK and WORLD_SIZE and let mpirun number the ranks"
        )
    if interface != "auto":
        net.address_of(interface, addresses, host)
    return environment.port_number(env, "MASTER_PORT") if "MASTER_PORT" in env else 0


def _check_sizes(mpi_size: int | None, env: Mapping[str, str]) -> None:
    size = environment.whole_number(env, "WORLD_SIZE")
    if size is None and environment.in_slurm_step(env) and not mpi.launched_by_mpirun(env):
        size = environment.slurm_size(env)
    if mpi_size is None or size is None or size == mpi_size:
        return
    if mpi_size == 1:
        raise TopologyError(
            f"the job has {size} ranks but MPI sees 1: "
            f"launch with mpirun -np {size} ..., or set comm.hosts to auto"
        )
    raise TopologyError(
        f"the job has {size} ranks (WORLD_SIZE) but MPI sees {mpi_size}: "
        f"launch with mpirun -np {size} ..., or unset RANK and WORLD_SIZE, "
        f"or set comm.hosts to env"
    )


def _mpi_store_ip(
    env: Mapping[str, str],
    interface: str,
    mine: tuple[Address, ...],
    others: list[list[Address]],
    host: str,
) -> str:
    named = named_address(interface, mine, host)
    asked = env.get("MASTER_ADDR", "").strip()
    if asked and not all(map(net.is_loopback, net.resolve(asked))):
        return own_ip(asked, named, mine, host)
    found = named or net.shared_address(mine, others)
    if found is None:
        raise LaunchError(
            f"host {host} has no address that the other hosts could reach: "
            f"name its interface in comm.interface"
        )
    return found.ip


# --- shared by the launchers


def _complete(place: Place, interface: str) -> Job:
    """Fill in what the numbers imply, and open rank 0's socket."""
    host = socket.gethostname()
    one_host = place.local_size == place.size
    addresses = net.local_addresses()
    store_host, way = meeting(place, one_host, interface, addresses, host)
    job = Job(
        rank=place.rank,
        world_size=place.size,
        local_rank=place.local_rank,
        local_world_size=place.local_size,
        hosts=(host,) * place.size if one_host else None,
        host=host,
        launcher=place.launcher,
        store_host=store_host,
        store_port=place.store_port,
        store_shared=place.store_shared,
        interface=way,
    )
    if job.rank != 0 or job.store_shared:
        return job
    sock = open_store_socket(job)
    return replace(job, store_port=sock.getsockname()[1], store_socket=sock)
