"""What MPI knows about the job. The only file that imports mpi4py, and only inside functions.

MPI is used for discovery alone: a session starts it, asks, and ends it again at once. Ended, it can
neither hang an exit (``MPI_Finalize`` waits for every rank) nor object to ``os._exit``. When the
calling script has started MPI itself, the session leaves it running.
"""

from __future__ import annotations

import faulthandler
import socket
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ds_cp.errors import CommError, TopologyError
from ds_cp.topology.hosts import name_hosts

# Set by mpirun itself (Open MPI; MPICH's and Intel's Hydra), never by srun.
_MPIRUN_MARKS = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "HYDI_CONTROL_FD")
# Set by every launcher that speaks PMI: any mpirun, and srun --mpi=pmi2|pmix.
_PMI_MARKS = ("PMI_SIZE", "PMIX_RANK")


def launched_by_mpi(env: Mapping[str, str]) -> bool:
    """Whether an MPI launcher, or a launcher that speaks PMI, started this process."""
    return any(name in env for name in _MPIRUN_MARKS + _PMI_MARKS)


def launched_by_mpirun(env: Mapping[str, str]) -> bool:
    """Whether ``mpirun`` did. Inside ``srun`` the PMI variables alone do not say so."""
    if any(name in env for name in _MPIRUN_MARKS):
        return True
    return "SLURM_PROCID" not in env and any(name in env for name in _PMI_MARKS)


@dataclass(frozen=True)
class MpiFacts:
    """This rank in ``MPI_COMM_WORLD``, and the host of every rank.

    Two ranks share a host when MPI says they share memory, whatever their host names say; each
    group bears the name of its first rank's host, with ``#2`` and so on where names repeat.
    """

    rank: int
    size: int
    hosts: tuple[str, ...]
    local_rank: int
    local_size: int


class MpiSession:
    """MPI while it runs: facts, and two small collectives that every rank has to enter."""

    def __init__(self, mpi: Any, comm: Any, timeout_s: float) -> None:
        self._mpi = mpi
        self._comm = comm
        self._timeout_s = timeout_s
        self.facts = self._find()

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank. ``CommError`` past the deadline."""
        # Buffers, not the lower-case calls of mpi4py: those pickle.
        data = text.encode()
        size = self._comm.Get_size()
        lengths = array("q", [0] * size)
        self._wait(self._comm.Iallgather(array("q", [len(data)]), lengths), "lengths")
        width = max(*lengths, 1)
        received = bytearray(width * size)
        sent = data.ljust(width, b"\0")
        self._wait(self._comm.Iallgather(sent, received), "texts")
        return [
            received[i * width : i * width + length].decode() for i, length in enumerate(lengths)
        ]

    def broadcast(self, text: str) -> str:
        """Rank 0's text on every rank."""
        return self.gather(text if self._comm.Get_rank() == 0 else "")[0]

    def _find(self) -> MpiFacts:
        rank = self._comm.Get_rank()
        names = self.gather(socket.gethostname())  # first, since only this wait has a deadline
        shared = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED, key=rank)
        local_rank, local_size = shared.Get_rank(), shared.Get_size()
        ranks = array("q", [0] * local_size)
        shared.Allgather(array("q", [rank]), ranks)
        shared.Free()
        leaders = [int(text) for text in self.gather(str(min(ranks)))]
        return MpiFacts(
            rank, self._comm.Get_size(), name_hosts(leaders, names), local_rank, local_size
        )

    def _wait(self, request: Any, what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not request.Test():
            if time.monotonic() > deadline:
                raise CommError(
                    f"MPI discovery: not every rank sent its {what} within {self._timeout_s:g} s; "
                    f"check that the hosts reach each other "
                    f"(mpirun --mca btl_tcp_if_include NAME chooses the interface)"
                )
            time.sleep(0.0005)


@contextmanager
def session(timeout_s: float = 120.0) -> Iterator[MpiSession]:
    """MPI for the length of a ``with`` block; every rank of the job has to come.

    Once only in a process, unless the script has started MPI itself (it cannot be started again).
    Raises ``TopologyError`` when mpi4py or an MPI library is missing, or MPI was ended before.
    A rank that stays away past ``timeout_s`` ends the others: by ``CommError``, or in MPI's own
    start and end by leaving the process with status 1.
    """
    mpi, ours = _start(timeout_s)
    try:
        yield MpiSession(mpi, mpi.COMM_WORLD, timeout_s)
    except CommError:
        raise  # a rank is missing: finalizing would wait for it without end
    except BaseException:
        _end(mpi, ours, timeout_s)
        raise
    _end(mpi, ours, timeout_s)


def discover(timeout_s: float = 120.0) -> MpiFacts:
    """The facts alone (see ``session``)."""
    with session(timeout_s) as found:
        return found.facts


def _start(timeout_s: float) -> tuple[Any, bool]:
    try:
        import mpi4py

        # Import without starting MPI, and no hook at exit: both belong to the session.
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as err:  # RuntimeError: mpi4py found no MPI library
        raise TopologyError(
            f"this job was launched by MPI, but mpi4py cannot be used ({_one_line(err)}): "
            f'pip install "ds_cp[mpi]", '
            f"or set comm.hosts to env and export MASTER_ADDR and MASTER_PORT"
        ) from None
    if MPI.Is_finalized():
        raise TopologyError(
            "MPI was started and ended before in this process and cannot be started again: "
            "import mpi4py.MPI first in a script that uses it, "
            "or hand over the Job found the first time"
        )
    ours = not MPI.Is_initialized()
    if ours:
        with _exit_after(timeout_s):
            _mpi_init_waits_for_every_rank(MPI)
    return MPI, ours


def _end(mpi: Any, ours: bool, timeout_s: float) -> None:
    if ours:
        with _exit_after(timeout_s):
            _mpi_finalize_waits_for_every_rank(mpi)


# When a rank never comes, the stack that _exit_after prints names these functions.


def _mpi_init_waits_for_every_rank(mpi: Any) -> None:
    mpi.Init_thread(mpi.THREAD_FUNNELED)


def _mpi_finalize_waits_for_every_rank(mpi: Any) -> None:
    mpi.Finalize()


@contextmanager
def _exit_after(timeout_s: float) -> Iterator[None]:
    """A deadline for MPI's own start and end, which hold the interpreter lock while they wait: no
    Python thread or signal handler runs then. faulthandler's watchdog does; it writes the stack
    and ends the process with status 1, and mpirun ends the other ranks."""
    if sys.__stderr__ is None:
        yield
        return
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _one_line(err: BaseException) -> str:
    lines = str(err).splitlines()
    return lines[0] if lines else type(err).__name__
