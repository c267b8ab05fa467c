"""Virtual environments of their own for what must not share one with ds_cp."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PARENT = Path(".cache/environments")
INSTALL_S = 600  # seconds that pip gets


def environment(
    name: str, packages: Sequence[str], parent: Path = PARENT, install_s: float = INSTALL_S
) -> Path:
    """The python of the environment ``name`` with ``packages`` in it; made where it is missing or
    was made for other packages, by one process at a time. Raises ``RuntimeError`` with pip's last
    lines, and ``subprocess.TimeoutExpired``."""
    folder = parent / name
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    wanted = mark(packages)
    parent.mkdir(parents=True, exist_ok=True)
    with _alone(parent / f"{name}.lock"):
        if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            _run([sys.executable, "-m", "venv", "--clear", str(folder)], INSTALL_S)
            # What is never imported is never compiled: of the largest one, most of its seconds.
            pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--retries", "2"]
            _run([*pip, *packages], install_s)
            stamp.write_text(wanted)
    return python.absolute()


def mark(packages: Sequence[str]) -> str:
    """What an environment was made for, in one line."""
    return hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock that ends with this process."""
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str], limit_s: float) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{last}")
