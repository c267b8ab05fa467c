"""What each launcher's environment variables say about a rank. Reads mappings, opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ds_cp.errors import TopologyError
from ds_cp.topology import slurm
from ds_cp.topology.net import LOOPBACK, names_loopback

INDEX = "JOB_COMPLETION_INDEX"  # of a pod in an Indexed Job, from 0; Kubernetes sets it


@dataclass(frozen=True)
class Place:
    """A rank as its launcher describes it, and the store's address.

    ``local_size`` is ``None`` where the launcher does not say how many ranks share the host.
    ``peers``: names or addresses of hosts on the job's network, where the launcher lists them.
    Raises ``TopologyError`` for numbers that no job has.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    launcher: str
    store_host: str = LOOPBACK
    store_port: int = 0  # any free one
    store_shared: bool = False
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        local = self.size if self.local_size is None else self.local_size
        if not 0 <= self.rank < self.size:
            raise TopologyError(
                f"{self.launcher} gave rank {self.rank} of {self.size}: "
                f"ranks are 0 to size - 1, check RANK and WORLD_SIZE"
            )
        if not 0 <= self.local_rank < local <= self.size:
            raise TopologyError(
                f"{self.launcher} gave local rank {self.local_rank} of {local} "
                f"in a job of {self.size}: check LOCAL_RANK and the ranks per host"
            )


def from_rank_variables(env: Mapping[str, str]) -> Place:
    """``RANK`` and the variables beside it: deepspeed, torchrun, ds-cp, or set by hand; or a pod's
    number in an Indexed Job of Kubernetes. Raises ``TopologyError`` when some are missing or make
    no sense."""
    size, rank = _int(env, "WORLD_SIZE"), whole_number(env, "RANK")
    if size > 1 and is_pod(env):
        return _from_pod(env, size)
    local_size = whole_number(env, "LOCAL_WORLD_SIZE")
    if local_size is None:
        local_size = whole_number(env, "LOCAL_SIZE")
    local_rank = whole_number(env, "LOCAL_RANK")
    if size == 1:
        rank, local_rank, local_size = rank or 0, local_rank or 0, 1
    if rank is None:
        raise TopologyError(f"WORLD_SIZE is {size} but RANK is not set: set both or neither")
    if local_rank is None:
        raise TopologyError(
            "RANK is set but LOCAL_RANK is not: set it to the rank's number on its host "
            "(0 with one rank per host)"
        )
    launcher = launcher_by_rank(env)
    if launcher is None:
        launcher = "deepspeed" if "LOCAL_SIZE" in env or "CROSS_SIZE" in env else "python"
    place = Place(rank, size, local_rank, local_size, launcher)
    if size == 1:  # no other rank has to find the store
        return place
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() in ("true", "1")
    place = replace(
        place,
        store_host=_master_addr(env),
        store_port=port_number(env, "MASTER_PORT"),
        store_shared=shared,
    )
    return place if shared else _settle_loopback(place)  # torchrun's own processes have met there


def is_pod(env: Mapping[str, str]) -> bool:
    """Whether this process is the one rank of a pod, whose number the Job controller gave it. A Job
    of pods that are apart sets no ``WORLD_SIZE``; torchrun in a pod sets ``RANK``."""
    return INDEX in env and "WORLD_SIZE" in env and "RANK" not in env


def _from_pod(env: Mapping[str, str], size: int) -> Place:
    place = Place(_int(env, INDEX), size, 0, 1, "kubernetes")
    place = replace(place, store_host=_master_addr(env), store_port=port_number(env, "MASTER_PORT"))
    return _settle_loopback(place)


def _settle_loopback(place: Place) -> Place:
    """The place, of one host where the store is on a loopback address. ``TopologyError`` when the
    launcher counts ranks on other hosts: they would look for the store on their own host."""
    if not names_loopback(place.store_host) or place.local_size == place.size:
        return place
    if place.local_size is None and not place.peers:
        return replace(place, local_size=place.size)
    here = "some" if place.local_size is None else str(place.local_size)
    raise TopologyError(
        f"MASTER_ADDR is {place.store_host}, which every host takes for itself, "
        f"but of the job's {place.size} ranks {place.launcher} puts {here} on this host: "
        f"set MASTER_ADDR to an address of rank 0's host that the other hosts reach "
        f"(with all ranks on one host, set LOCAL_WORLD_SIZE to {place.size})"
    )


def launcher_by_rank(env: Mapping[str, str]) -> str | None:
    """The launcher that certainly set ``RANK``: ds-cp or torchrun, also inside mpirun or srun."""
    if env.get("DS_CP_LAUNCHER") == "ds-cp":
        return "ds-cp"
    return "torchrun" if any(name.startswith("TORCHELASTIC_") for name in env) else None


def in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process."""
    if "SLURM_PROCID" not in env or not env.get("SLURM_STEP_ID", "").isdecimal():
        return False
    # salloc's shell and sbatch's script are steps too, numbered from the top; they are one process.
    return int(env["SLURM_STEP_ID"]) < 0xFFFFFFF0


def slurm_size(env: Mapping[str, str]) -> int:
    """Number of tasks in the step."""
    return _int(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")


def from_slurm(env: Mapping[str, str]) -> Place:
    """A task of a Slurm step; MASTER_ADDR and MASTER_PORT are obeyed where the user set them.
    Raises ``TopologyError`` when Slurm's variables are missing or make no sense."""
    size = slurm_size(env)
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
    else:
        nodes = whole_number(env, "SLURM_STEP_NUM_NODES") or whole_number(env, "SLURM_NNODES")
        wished = whole_number(env, "SLURM_NTASKS_PER_NODE")  # a limit: exact only if they are full
        if nodes == 1:
            local_size = size
        elif nodes is not None and wished is not None and nodes * wished == size:
            local_size = wished
    place = Place(_int(env, "SLURM_PROCID"), size, _int(env, "SLURM_LOCALID"), local_size, "slurm")
    if size == 1:
        return place
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    names = slurm.expand_nodelist(listed) if listed else ()
    if local_size is None and len(names) == 1:
        place = replace(place, local_size=size)
    if "MASTER_ADDR" in env:
        address = _master_addr(env)
    else:
        # Task 0 is on the first node. SLURM_LAUNCH_NODE_IPADDR is where srun was typed, which
        # may be a login node, so it comes last.
        address = names[0] if names else env.get("SLURM_LAUNCH_NODE_IPADDR", "")
        if not address:
            raise TopologyError(
                "Slurm says neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST: "
                "export MASTER_ADDR (the host of rank 0) before srun"
            )
    if "MASTER_PORT" in env:
        port = port_number(env, "MASTER_PORT")
    else:
        port = slurm.step_port(_int(env, "SLURM_JOB_ID"), _int(env, "SLURM_STEP_ID"))
    return _settle_loopback(replace(place, store_host=address, store_port=port, peers=names[1:]))


def mpirun_size(env: Mapping[str, str]) -> int | None:
    """Number of ranks that mpirun said it started."""
    size = whole_number(env, "OMPI_COMM_WORLD_SIZE")
    return whole_number(env, "PMI_SIZE") if size is None else size


def from_mpirun_variables(env: Mapping[str, str]) -> Place:
    """A rank of mpirun without MPI itself; the user has to say where the store is."""
    if "OMPI_COMM_WORLD_SIZE" in env:
        prefix, local_rank, local_size = (
            "OMPI_COMM_WORLD_",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
    else:
        prefix, local_rank, local_size = "PMI_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
    place = Place(
        _int(env, prefix + "RANK"),
        _int(env, prefix + "SIZE"),
        _int(env, local_rank),
        _int(env, local_size),
        "mpi",
    )
    place = replace(place, store_host=_master_addr(env), store_port=port_number(env, "MASTER_PORT"))
    return _settle_loopback(place)


def peek_rank(env: Mapping[str, str]) -> int:
    """This process's rank for "print once"; 0 when nothing says otherwise. Never raises."""
    names = ["RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"]
    if in_slurm_step(env):
        names.append("SLURM_PROCID")
    if is_pod(env):
        names.append(INDEX)
    for name in names:
        if env.get(name, "").strip().isdecimal():
            return int(env[name])
    return 0


def whole_number(env: Mapping[str, str], name: str) -> int | None:
    """The value of a variable, ``None`` when it is not set. ``TopologyError`` for other text."""
    text = env.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise TopologyError(f"{name} must be a whole number (got {text[:80]!r})") from None


def _int(env: Mapping[str, str], name: str) -> int:
    value = whole_number(env, name)
    if value is None:
        raise TopologyError(
            f"{name} is not set although this process looks like a rank of a job: "
            f"launch with deepspeed, torchrun, mpirun or srun, or set it"
        )
    return value


def port_number(env: Mapping[str, str], name: str) -> int:
    """The value of a variable that must be set to a port; else a ``TopologyError``."""
    port = _int(env, name)
    if not 1 <= port <= 65535:
        raise TopologyError(f"{name} must be a port, 1 to 65535 (got {port})")
    return port


def _master_addr(env: Mapping[str, str]) -> str:
    address = env.get("MASTER_ADDR", "").strip().removeprefix("[").removesuffix("]")
    if not address:
        raise TopologyError("MASTER_ADDR is not set: set it to the address of rank 0's host")
    return address
