"""The parts of the conformance run: what each needs, what it runs, how long it may take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.agents.environments import prepare
from benchmarks.agents.known import AGENTS
from benchmarks.clients.run import CLIENTS
from benchmarks.environments import environment
from benchmarks.evaluation.__main__ import PACKAGES as EVALUATION
from benchmarks.fuzz.__main__ import PACKAGES as FUZZ
from benchmarks.schemas.corpus import PACKAGES as CORPUS
from benchmarks.sweep import PACKAGES as SWEEP
from tests.browser import tools

INSTALL_S = 300.0  # seconds that pip gets for one environment


class SkippedError(Exception):
    """A part cannot run here; the message says why."""


def nothing() -> None:
    """Needs nothing."""


@dataclass(frozen=True)
class Part:
    """One part. ``needs`` prepares it, and raises ``SkippedError`` where that cannot be done.
    ``limit_s``: seconds that the command may take on two busy cores."""

    name: str
    argv: Sequence[str]
    limit_s: float
    needs: Callable[[], None] = field(default=nothing)


def made(*wanted: tuple[str, Sequence[str]]) -> Callable[[], None]:
    """Environments by name and packages, made where they are missing."""

    def make() -> None:
        for name, packages in wanted:
            try:
                environment(name, packages, install_s=INSTALL_S)
            except (RuntimeError, OSError, subprocess.SubprocessError) as err:
                why = " ".join(str(err).split())[-200:]
                raise SkippedError(f"its environment {name} cannot be made: {why}") from err

    return make


def agents() -> None:
    """The agents, of npm and of pip."""
    for agent in AGENTS:
        try:
            prepare(agent, INSTALL_S)
        except (RuntimeError, OSError, subprocess.SubprocessError) as err:
            why = " ".join(str(err).split())[-200:]
            raise SkippedError(f"{agent.name} cannot be installed: {why}") from err


def browser() -> None:
    """A browser and its client."""
    if tools.chromium() is not None:
        try:
            tools.fetch()
        except (OSError, subprocess.SubprocessError) as err:
            raise SkippedError(f"its tools cannot be fetched: {err}") from err
    if why := tools.missing():
        raise SkippedError(why)


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def parts(out: Path) -> list[Part]:
    """All parts, those first that say most in a minute. Their results go to ``out``: none changes a
    file of the repository."""
    clients = [(client.name, client.packages) for client in CLIENTS]
    return [
        Part("browser", module("tests.browser"), 270, browser),
        Part("clients", module("benchmarks.clients", "--check"), 530, made(*clients)),
        Part("agents", module("benchmarks.agents", "--check"), 150, agents),
        Part(
            "evaluation",
            module("benchmarks.evaluation", "--out", str(out / "evaluation.json")),
            280,
            made(("lm-eval", EVALUATION)),
        ),
        Part(
            "schemas",
            module("benchmarks.schemas", "--count", "250", "--out", str(out / "schemas.json")),
            280,
            made(("schemastore", CORPUS)),
        ),
        Part(
            "sweep",
            module("benchmarks.sweep", "--seconds", "15", "--out", str(out / "sweep.json")),
            240,
            made(("guidellm", SWEEP)),
        ),
        Part(
            "needle",
            module(
                *("benchmarks.needle", "--lengths", "512", "2048"),
                *("--out", str(out / "needle.json")),
            ),
            240,
        ),
        Part(
            "fuzz",
            module(
                *("benchmarks.fuzz", "--cases", "120", "--limit-s", "120"),
                *("--out", str(out / "fuzz.json")),
            ),
            400,
            made(("schemathesis", FUZZ)),
        ),
    ]
