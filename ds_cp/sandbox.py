"""Processes beside this one that do what may not end or may eat memory: how they start, and the
limits that the kernel keeps for them. Standard library only."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

# Finds the same ds_cp as this process, installed or not.
_START = (
    "import importlib, sys; sys.path.insert(0, sys.argv[3]); "
    "importlib.import_module(sys.argv[1]).main(int(sys.argv[2]))"
)


def start_beside(module: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A new process that runs ``main(fd)`` of a module of ds_cp, and this side of the socket whose
    other side is ``fd``. It hears that this process has ended by its end. Raises ``OSError``."""
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parents[1])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, module, str(theirs.fileno()), root],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # what this process prints is for its reader alone
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def limit_this_process(cpu_s: float, wall_s: float, memory_bytes: int) -> None:
    """Have the kernel end this process when it computes or lasts too long (SIGPROF, SIGALRM), and
    refuse it more than ``memory_bytes`` beside what it has."""
    if size := bytes_of_this_process(0):
        _limit_memory(size + memory_bytes)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def unlimit_this_process() -> None:
    """Take those limits away."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _limit_memory(None)


def bytes_of_this_process(field: int) -> int:
    """0 for its address space, 1 for what of it is in memory. 0 where the system does not tell;
    then no limit of memory is kept."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[field]) * resource.getpagesize()
    except OSError:
        return 0


def _limit_memory(most: int | None) -> None:
    """Bytes of address space; None for as many as the system allows."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if most is None else most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
