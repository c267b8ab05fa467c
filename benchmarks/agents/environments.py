"""Environments of npm's agents, made where they are missing; those of Python's by
``benchmarks.environments``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.agents.known import Agent
from benchmarks.environments import PARENT, environment, mark

INSTALL_S = 600.0  # seconds that npm gets
# What npm may not run by itself where scripts of packages are not allowed: these fetch nothing that
# is not in the registry.
_SCRIPTS = {"@anthropic-ai/claude-code": "install.cjs", "opencode-ai": "postinstall.mjs"}


def prepare(agent: Agent, install_s: float = INSTALL_S) -> Path:
    """The folder of an agent's environment. Raises ``RuntimeError`` with the installer's last
    lines, ``FileNotFoundError`` where there is no npm."""
    name = "agent-" + agent.name.lower().replace(" ", "-")
    if agent.python:
        return environment(name, agent.packages, install_s=install_s).parent.parent
    return _npm((PARENT / name).absolute(), agent.packages, install_s)


def _npm(folder: Path, packages: Sequence[str], install_s: float) -> Path:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise FileNotFoundError("npm and node are not on the PATH (Debian: apt-get install npm)")
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == mark(packages):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _run([npm, "install", "--no-fund", "--no-audit", "--silent", *packages], folder, install_s)
    for name, script in _SCRIPTS.items():
        package = folder / "node_modules" / name
        if (package / script).exists():
            _run([node, script], package, install_s)
    stamp.write_text(mark(packages))
    return folder


def _run(command: Sequence[str], folder: Path, limit_s: float) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=limit_s,
    )  # fmt: skip
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{last}")
