"""What the launcher says: this rank's place in the job, and where rank 0's store listens."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ds_cp.errors import LaunchError, TopologyError
from ds_cp.topology import mpi, net, slurm

LOOPBACK = "127.0.0.1"

_OTHER_PORT = {
    "deepspeed": "choose another port with deepspeed --master_port N",
    "torchrun": "choose another port with torchrun --master-port N",
}
_ANY_OTHER_PORT = "choose another port with MASTER_PORT=N in the environment"


@dataclass(frozen=True)
class Job:
    """One rank's view of the job, before any rank has talked to another (except through MPI).

    ``hosts`` is the host of each rank, or ``None`` when only an exchange of ``host`` will tell.
    ``store_shared``: a store listens at ``store_host:store_port`` already, every rank is a client.
    Otherwise rank 0 has ``store_socket``, bound and listening there: on loopback when the job is on
    one host. ``interface``: network interface for the job's own traffic (``lo`` on one host), or
    ``None`` where it could not be told.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    hosts: tuple[str, ...] | None
    host: str
    launcher: str  # python, deepspeed, torchrun, slurm, mpi, ds-cp
    store_host: str
    store_port: int
    store_shared: bool = False
    interface: str | None = None
    store_socket: socket.socket | None = field(default=None, compare=False, repr=False)

    @property
    def one_host(self) -> bool:
        """Whether all ranks are known to be on one host."""
        if self.hosts is not None:
            return len(set(self.hosts)) == 1
        return self.local_world_size == self.world_size


def detect(
    env: Mapping[str, str], *, hosts: str = "auto", interface: str = "auto", timeout_s: float = 60.0
) -> Job:
    """The job that this process is a rank of. Rank 0 comes back with its store's socket open.

    ``hosts``: ``auto`` asks MPI when mpirun started us and the launcher's environment otherwise;
    ``mpi`` and ``env`` ask that one alone. Of the environment, ``RANK`` / ``WORLD_SIZE``
    (deepspeed, torchrun, ds-cp) come before Slurm's step and mpirun's own variables; with none of
    them it is a job of one rank. ``interface``: a network interface's name, or ``auto``.

    Raises ``TopologyError`` when the sources disagree or a value makes no sense, ``LaunchError``
    when the store cannot listen.
    """
    if hosts not in ("auto", "mpi", "env"):
        raise TopologyError(f"comm.hosts must be auto, mpi or env (got {hosts!r})")
    if hosts == "mpi":
        return _from_mpi(env, interface, timeout_s)
    if hosts == "auto" and env.get("DS_CP_LAUNCHER") != "ds-cp" and mpi.launched_by_mpirun(env):
        _check_sizes(_mpirun_size(env), env)  # before MPI starts: it would wait for missing ranks
        return _from_mpi(env, interface, timeout_s)
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_rank_variables(env, interface)
    if _in_slurm_step(env):
        return _from_slurm(env, interface)
    if hosts == "env" and mpi.launched_by_mpi(env):
        return _from_mpirun_variables(env, interface)
    return _complete(_Place(0, 1, 0, 1, "python"), interface, LOOPBACK, 0)


def peek_rank(env: Mapping[str, str]) -> int:
    """This process's rank for "print once"; 0 when nothing says otherwise. Never raises."""
    names = ["RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"]
    if _in_slurm_step(env):
        names.append("SLURM_PROCID")
    for name in names:
        if env.get(name, "").strip().isdecimal():
            return int(env[name])
    return 0


def open_store_socket(job: Job, *, port: int | None = None) -> socket.socket:
    """A listening socket for rank 0's store, at ``job.store_port`` unless ``port`` says another.

    Bound to loopback for a job on one host, else to the one address that the other hosts use.
    ``LaunchError`` when the port is in use or the address is not this host's.
    """
    ip = LOOPBACK if job.one_host else _own_ip(job.store_host, job.interface, job.host)
    way_out = _OTHER_PORT.get(job.launcher, _ANY_OTHER_PORT)
    return net.listen(ip, job.store_port if port is None else port, way_out)


# --- the launchers' environments


@dataclass(frozen=True)
class _Place:
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    launcher: str

    def __post_init__(self) -> None:
        local = self.size if self.local_size is None else self.local_size
        if not 0 <= self.rank < self.size:
            raise TopologyError(
                f"{self.launcher} gave rank {self.rank} of {self.size}: ranks are 0 to size - 1, "
                f"check RANK and WORLD_SIZE"
            )
        if not 0 <= self.local_rank < local <= self.size:
            raise TopologyError(
                f"{self.launcher} gave local rank {self.local_rank} of {local} in a job of "
                f"{self.size}: check LOCAL_RANK and the ranks per host"
            )


def _from_rank_variables(env: Mapping[str, str], interface: str) -> Job:
    size, rank = _int(env, "WORLD_SIZE"), _int(env, "RANK")
    local_size = _int_or_none(env, "LOCAL_WORLD_SIZE")
    if local_size is None:
        local_size = _int_or_none(env, "LOCAL_SIZE")
    local_rank = _int_or_none(env, "LOCAL_RANK")
    if size == 1:
        local_size, local_rank = 1, local_rank or 0
    if local_rank is None:
        raise TopologyError(
            "RANK is set but LOCAL_RANK is not: set it to the rank's number on its host "
            "(0 with one rank per host)"
        )
    if env.get("DS_CP_LAUNCHER") == "ds-cp":
        launcher = "ds-cp"
    elif any(name.startswith("TORCHELASTIC_") for name in env):
        launcher = "torchrun"
    else:
        launcher = "deepspeed" if "LOCAL_SIZE" in env or "CROSS_SIZE" in env else "python"
    place = _Place(rank, size, local_rank, local_size, launcher)
    if size == 1 and "MASTER_ADDR" not in env:
        return _complete(place, interface, LOOPBACK, 0)
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() in ("true", "1")
    return _complete(place, interface, _master_addr(env), _port(env, "MASTER_PORT"), shared)


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    if "SLURM_PROCID" not in env or not env.get("SLURM_STEP_ID", "").isdecimal():
        return False
    # salloc's shell and sbatch's script are steps too, numbered from the top; they are one process.
    return int(env["SLURM_STEP_ID"]) < 0xFFFFFFF0


def _slurm_size(env: Mapping[str, str]) -> int:
    return _int(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")


def _from_slurm(env: Mapping[str, str], interface: str) -> Job:
    size = _slurm_size(env)
    local_size: int | None = None
    if size == 1:
        local_size = 1
    elif "SLURM_STEP_TASKS_PER_NODE" in env:
        counts = slurm.expand_tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        node = _int(env, "SLURM_NODEID") if len(counts) > 1 else 0
        if not 0 <= node < len(counts):
            raise TopologyError(
                f"SLURM_NODEID is {node} but SLURM_STEP_TASKS_PER_NODE lists {len(counts)} nodes"
            )
        local_size = counts[node]
    elif "SLURM_NTASKS_PER_NODE" in env:
        local_size = _int(env, "SLURM_NTASKS_PER_NODE")
    place = _Place(_int(env, "SLURM_PROCID"), size, _int(env, "SLURM_LOCALID"), local_size, "slurm")
    if size == 1:
        return _complete(place, interface, LOOPBACK, 0)
    if "MASTER_ADDR" in env:
        address = _master_addr(env)
    else:
        # Task 0 is on the first node. SLURM_LAUNCH_NODE_IPADDR is where srun was typed, which
        # may be a login node, so it comes last.
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        address = slurm.expand_nodelist(nodes)[0] if nodes else ""
        address = address or env.get("SLURM_LAUNCH_NODE_IPADDR", "")
        if not address:
            raise TopologyError(
                "Slurm says neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST: export MASTER_ADDR "
                "(the host of rank 0) before srun"
            )
    if "MASTER_PORT" in env:
        port = _port(env, "MASTER_PORT")
    else:
        port = slurm.step_port(_int(env, "SLURM_JOB_ID"), _int(env, "SLURM_STEP_ID"))
    return _complete(place, interface, address, port)


def _mpirun_size(env: Mapping[str, str]) -> int | None:
    size = _int_or_none(env, "OMPI_COMM_WORLD_SIZE")
    return _int_or_none(env, "PMI_SIZE") if size is None else size


def _from_mpirun_variables(env: Mapping[str, str], interface: str) -> Job:
    if "OMPI_COMM_WORLD_SIZE" in env:
        prefix, local_rank, local_size = (
            "OMPI_COMM_WORLD_",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
    else:
        prefix, local_rank, local_size = "PMI_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
    place = _Place(
        _int(env, prefix + "RANK"),
        _int(env, prefix + "SIZE"),
        _int(env, local_rank),
        _int(env, local_size),
        "mpi",
    )
    return _complete(place, interface, _master_addr(env), _port(env, "MASTER_PORT"))


# --- MPI


def _from_mpi(env: Mapping[str, str], interface: str, timeout_s: float) -> Job:
    """Ask MPI. Every rank enters every exchange, and errors travel in them, so that all ranks
    raise the same one and none waits for a rank that has left."""
    with mpi.session(timeout_s) as session:
        facts = session.facts
        host = facts.hosts[facts.rank]
        try:
            addresses = net.local_addresses()
            port = _check_mpi_rank(facts, env, interface, addresses, host)
            mine = {"addresses": [[a.interface, a.ip, a.prefix] for a in addresses]}
        except TopologyError as error:
            mine = {"error": str(error)}
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
                        [net.Address(*entry) for entry in everyone[rank]["addresses"]]
                        for rank in range(facts.size)
                        if facts.hosts[rank] != host
                    ]
                    ip = _mpi_store_ip(env, interface, addresses, others, host)
                sock = net.listen(ip, port, _ANY_OTHER_PORT)
                store = {"ip": ip, "port": sock.getsockname()[1]}
            except (LaunchError, TopologyError) as error:
                store = {"error": str(error)}
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
        interface=_interface(interface, one_host, str(store["ip"]), addresses, host),
        store_socket=sock,
    )


def _check_mpi_rank(
    facts: mpi.MpiFacts,
    env: Mapping[str, str],
    interface: str,
    addresses: tuple[net.Address, ...],
    host: str,
) -> int:
    """Compare MPI with the environment; the port asked for (0: any) when they agree."""
    _check_sizes(facts.size, env)
    rank = _int_or_none(env, "RANK")
    if rank is not None and rank != facts.rank:
        raise TopologyError(
            f"the environment says RANK={rank} but MPI says rank {facts.rank}: unset RANK and "
            f"WORLD_SIZE and let mpirun number the ranks"
        )
    if interface != "auto":
        net.address_of(interface, addresses, host)
    return _port(env, "MASTER_PORT") if "MASTER_PORT" in env else 0


def _check_sizes(mpi_size: int | None, env: Mapping[str, str]) -> None:
    size = _int_or_none(env, "WORLD_SIZE")
    if size is None and _in_slurm_step(env) and not mpi.launched_by_mpirun(env):
        size = _slurm_size(env)
    if mpi_size is None or size is None or size == mpi_size:
        return
    if mpi_size == 1:
        raise TopologyError(
            f"the job has {size} ranks but MPI sees 1: launch with mpirun -np {size} ..., or set "
            f"comm.hosts to auto"
        )
    raise TopologyError(
        f"the job has {size} ranks (WORLD_SIZE) but MPI sees {mpi_size}: launch with mpirun -np "
        f"{size} ..., or unset RANK and WORLD_SIZE, or set comm.hosts to env"
    )


def _mpi_store_ip(
    env: Mapping[str, str],
    interface: str,
    mine: tuple[net.Address, ...],
    others: list[list[net.Address]],
    host: str,
) -> str:
    if "MASTER_ADDR" in env:
        return _own_ip(env["MASTER_ADDR"], None if interface == "auto" else interface, host)
    if interface != "auto":
        return net.address_of(interface, mine, host).ip
    found = net.shared_address(mine, others)
    if found is None:
        raise LaunchError(
            f"host {host} has no IPv4 address that the other hosts could reach: name its interface "
            f"in comm.interface"
        )
    return found.ip


# --- shared by the launchers


def _complete(
    place: _Place, interface: str, store_host: str, store_port: int, shared: bool = False
) -> Job:
    """Fill in what the numbers imply, and open rank 0's socket."""
    host = socket.gethostname()
    one_host = place.local_size == place.size
    addresses = net.local_addresses()
    if one_host and not shared:
        store_host = LOOPBACK
    job = Job(
        rank=place.rank,
        world_size=place.size,
        local_rank=place.local_rank,
        local_world_size=place.local_size,
        hosts=(host,) * place.size if one_host else None,
        host=host,
        launcher=place.launcher,
        store_host=store_host,
        store_port=store_port,
        store_shared=shared,
        interface=_interface(interface, one_host, store_host, addresses, host),
    )
    if job.rank != 0 or shared:
        return job
    sock = open_store_socket(job)
    return replace(job, store_port=sock.getsockname()[1], store_socket=sock)


def _interface(
    chosen: str, one_host: bool, store_host: str, addresses: tuple[net.Address, ...], host: str
) -> str | None:
    if chosen != "auto":
        return net.address_of(chosen, addresses, host).interface
    if one_host:
        return net.loopback_interface(addresses)
    towards = net.route_to(net.resolve(store_host), addresses)
    if towards is None or towards.is_loopback:  # Debian gives a host's own name 127.0.1.1
        towards = next((a for a in addresses if not a.is_loopback), None)
    return None if towards is None else towards.interface


def _own_ip(store_host: str, interface: str | None, host: str) -> str:
    """The address of this host to listen on, for others who connect to ``store_host``."""
    addresses = net.local_addresses()
    ip = net.resolve(store_host)
    if any(a.ip == ip and not a.is_loopback for a in addresses) or ":" in ip:
        return ip
    if ip.startswith("127.") and interface is not None:
        return net.address_of(interface, addresses, host).ip
    there = ", ".join(f"{a.interface} {a.ip}" for a in addresses if not a.is_loopback) or "none"
    raise LaunchError(
        f"rank 0 runs on host {host}, but the store's host {store_host} ({ip}) is not an address "
        f"that it shows to others (there: {there}): set MASTER_ADDR to one of those"
    )


def _int_or_none(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise TopologyError(f"{name} must be a whole number (got {text[:80]!r})") from None


def _int(env: Mapping[str, str], name: str) -> int:
    value = _int_or_none(env, name)
    if value is None:
        raise TopologyError(
            f"{name} is not set although this process looks like a rank of a job: launch with "
            f"deepspeed, torchrun, mpirun or srun, or set it"
        )
    return value


def _port(env: Mapping[str, str], name: str) -> int:
    port = _int(env, name)
    if not 1 <= port <= 65535:
        raise TopologyError(f"{name} must be a port, 1 to 65535 (got {port})")
    return port


def _master_addr(env: Mapping[str, str]) -> str:
    address = env.get("MASTER_ADDR", "").strip()
    if not address:
        raise TopologyError("MASTER_ADDR is not set: set it to the address of rank 0's host")
    return address
