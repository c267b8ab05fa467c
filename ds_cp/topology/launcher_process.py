"""The launcher's processes above a rank: which they are, whether they live, what they listen on.

A process is a launcher by the program that it runs: its executable, or the script or module that
its Python was started with. Never by a word in its command line: a start script may be called
anything.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# Launchers by their executable. The names in ``Job.launcher``.
_EXECUTABLES = {
    "mpirun": "mpi",
    "mpiexec": "mpi",
    "mpiexec.hydra": "mpi",
    "hydra_pmi_proxy": "mpi",
    "orterun": "mpi",
    "orted": "mpi",
    "prterun": "mpi",
    "prte": "mpi",
    "prted": "mpi",
    "srun": "slurm",
    "slurmstepd": "slurm",
    "slurmstepd-wlm": "slurm",  # as Debian calls it
}
# By the last part of the script that Python runs: what pip installs as a command.
_SCRIPTS = {
    "deepspeed": "deepspeed",
    "deepspeed.pt": "deepspeed",
    "torchrun": "torchrun",
    "ds-cp": "ds-cp",
}
# By the module of ``python -m``.
_MODULES = {
    "deepspeed.launcher.runner": "deepspeed",
    "deepspeed.launcher.launch": "deepspeed",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "ds_cp.cli": "ds-cp",
}
_WITH_VALUE = "XW"  # Python's options that are followed by a value


@dataclass(frozen=True)
class LauncherProcess:
    """One process of a launcher. ``name``: the program, for people."""

    name: str
    process: psutil.Process

    @property
    def is_alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        try:
            return bool(self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    @property
    def identity(self) -> str:
        """No other process of this host has had it, nor will have it. Linux; else its id."""
        start = ""
        with contextlib.suppress(OSError, IndexError):  # of another user, perhaps
            text = Path(f"/proc/{self.process.pid}/stat").read_text(errors="replace")
            start = text.rpartition(")")[2].split()[19]  # in ticks since the system's start
        return f"{self.process.pid}.{start}"

    def open_addresses(self) -> list[str]:
        """Where it listens for other machines too: ``*:29500``. Empty where that cannot be seen."""
        found = set()
        with contextlib.suppress(psutil.Error, OSError):
            for connection in self.process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    ip = ipaddress.ip_address(connection.laddr.ip)
                    if not ip.is_loopback:
                        where = "*" if ip.is_unspecified else connection.laddr.ip
                        found.add(f"{where}:{connection.laddr.port}")
        return sorted(found)

    def __str__(self) -> str:
        return f"{self.name} (process {self.process.pid})"


def launcher_processes(launcher: str) -> list[LauncherProcess]:
    """The processes of the launcher that started this one, the nearest first, with those of
    launchers directly above it (deepspeed has two; mpirun may run torchrun).

    ``launcher``: as ``Job.launcher`` says. Wrappers between it and this process are passed over.
    Empty for plain Python, and where none is found.
    """
    found: list[LauncherProcess] = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            kind, name = _identify(process)
            if found and kind is None:
                break
            if kind is not None and (found or kind == launcher):
                found.append(LauncherProcess(name, process))
    return found


def _identify(process: psutil.Process) -> tuple[str | None, str]:
    with contextlib.suppress(psutil.Error):
        try:
            executable = os.path.basename(process.exe())
        except psutil.AccessDenied:  # of another user: the kernel's name, of at most 15 characters
            executable = process.name()
        return launcher_of(executable, process.cmdline())
    return None, ""


def launcher_of(executable: str, argv: Sequence[str]) -> tuple[str | None, str]:
    """Which launcher a process is (as in ``Job.launcher``, None for no launcher), and its program's
    name. ``executable``: the file's name; ``argv``: the command line."""
    if executable.startswith(("python", "pypy")):
        module, script = _program(argv)
        if module is not None:
            return _MODULES.get(module), module
        name = os.path.basename(script)
        return _SCRIPTS.get(name), name
    return _EXECUTABLES.get(executable), executable


def _program(argv: Sequence[str]) -> tuple[str | None, str]:
    """The module, or else the script, that a Python with this command line runs."""
    rest = list(argv[1:])
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            return None, word
        if word.startswith("--"):
            continue
        for at, option in enumerate(word[1:], 2):
            value = word[at:] or (rest[0] if rest else "")
            if option == "m":
                return value, ""
            if option == "c":
                return None, ""
            if option in _WITH_VALUE:
                if not word[at:] and rest:
                    rest.pop(0)
                break
    return None, ""
