"""Start a job as a user would, know every process of it, and leave none behind.

A job's processes are told apart by a mark in their environment, which every launcher hands down: so
an orphan in another session or process group is found as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "DS_CP_TEST_MARK"
START_S = 120.0  # for a job to be ready, on a busy machine
# What a job promises, from a signal to the last process, on a machine that does nothing else.
END_S = 10.0
# What a launcher above the tests, or a shell, might have set.
_FOREIGN = re.compile(r"(OMPI|PMIX|PMI|PRTE|SLURM|TORCHELASTIC|DS_CP)_|MASTER_|OMP_NUM_THREADS$")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


class Job:
    """One started command. ``out`` and ``err`` are what it has printed so far, ``temporary`` is its
    folder for temporary files.

    It has a temporary folder of its own: an mpirun that is killed leaves a file there that is named
    by its process id, and a later mpirun with the same id would refuse to start ("The PMIx server's
    listener thread failed to start").
    """

    def __init__(
        self, argv: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.argv = list(argv)
        self._mark = uuid.uuid4().hex
        self._out, self._err = folder / f"{self._mark}.out", folder / f"{self._mark}.err"
        self.temporary = folder / self._mark[:8]
        self.temporary.mkdir()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                self.argv,
                cwd=ROOT,
                env=clean_environment()
                | {"TMPDIR": str(self.temporary)}
                | dict(env or {})
                | {MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=_default_sigint,
            )

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def story(self) -> str:
        """For the message of a failed check."""
        left = "\n".join(f"  {p.pid} {' '.join(_cmdline(p))[:150]}" for p in self.processes())
        return (
            f"\n$ {' '.join(self.argv)}\nexit code {self.process.poll()}\n--- stdout\n"
            f"{self.out[-4000:]}\n--- stderr\n{self.err[-6000:]}\n--- processes\n{left or '  none'}"
        )

    def processes(self) -> list[psutil.Process]:
        """The live processes of the job, wherever they hang in the process tree."""
        return marked(self._mark)

    def matching(self, text: str, rank: int | None = None) -> list[psutil.Process]:
        """Processes with ``text`` in their command line, of one rank where that is asked."""
        return [
            process
            for process in self.processes()
            if text in " ".join(_cmdline(process)) and (rank is None or _rank(process) == rank)
        ]

    def wait(self, limit_s: float) -> int:
        """The exit code; the job must end within the limit."""
        self.until("its end", lambda: self.process.poll() is not None, limit_s)
        return self.process.wait()

    def until(self, what: str, done: Callable[[], Any], limit_s: float) -> Any:
        """Poll until ``done()`` is true, and return its value. The limit is that of a machine that
        does nothing else; on a busy one it is longer by what each core has to do."""
        began = time.monotonic()
        while not (value := done()):
            if time.monotonic() - began > limit_s * busy():
                raise AssertionError(f"{what}: not within {limit_s:g} s{self.story()}")
            time.sleep(0.05)
        return value

    def gone(self, limit_s: float) -> None:
        """Wait for the launcher and for every process of the job to be gone."""
        self.until(
            "all processes gone",
            lambda: self.process.poll() is not None and not self.processes(),
            limit_s,
        )

    def ready(self) -> str:
        """The first address of a server, once it says that it is ready."""

        def address() -> str | None:
            if self.process.poll() is not None:
                raise AssertionError(f"ended before it was ready{self.story()}")
            found = re.search(r"^ds_cp ready: (http://\S+)", self.out, re.MULTILINE)
            return found[1] if found else None

        url: str = self.until("ready", address, START_S)
        return url

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the launcher's process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        """End whatever is left of the job."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait(60)
        shutil.rmtree(self.temporary, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    """The live processes that were started with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def busy() -> float:
    """What each core had to do in the last minute, in processes; 1 or more."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def clean_environment() -> dict[str, str]:
    """This process's environment without what would look like a job, and offline."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not _FOREIGN.match(name) and name not in _RANK_VARIABLES
    }
    path = os.pathsep.join([str(BIN), *([env["PATH"]] if env.get("PATH") else [])])
    return env | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def command(launcher: str, verb: str, ranks: int, args: Sequence[str]) -> list[str]:
    """How a user starts ``launch/<verb>.py`` (or ``ds-cp <verb>``) on ``ranks`` ranks."""
    script = [str(ROOT / "launch" / f"{verb}.py"), *args]
    if launcher == "python":
        return [sys.executable, *script]
    if launcher == "ds-cp":
        return [*ds_cp(), verb, "--ranks", str(ranks), *args]
    if launcher == "mpirun":
        flags = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        return [_tool("mpirun"), "-np", str(ranks), *flags, sys.executable, *script]
    port = ["--master_port", str(free_port())]  # the default of both is 29500
    if launcher == "torchrun":
        return [_tool("torchrun"), "--nproc-per-node", str(ranks), *port, *script]
    assert launcher == "deepspeed", launcher
    return [_tool("deepspeed"), "--num_gpus", str(ranks), *port, *script]


def ds_cp() -> list[str]:
    """The ``ds-cp`` command; its module where the package is not installed."""
    installed = BIN / "ds-cp"
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "ds_cp.cli"]


def _tool(name: str) -> str:
    beside = BIN / name
    return str(beside) if beside.exists() else name


def json_lines(text: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines of ``text``."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def post(url: str, body: Mapping[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
    """POST JSON, answer JSON."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _default_sigint() -> None:
    """A shell's background job ignores SIGINT and hands that down; a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _rank(process: psutil.Process) -> int:
    env = process.environ()
    return int(env.get("RANK") or env.get("OMPI_COMM_WORLD_RANK") or 0)
