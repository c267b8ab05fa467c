"""Contestants: each a job of one or more processes in an environment of its own, which answer JSON
lines. All but the one whose turn it is are stopped by the system, so that nobody's waiting threads
take part in another's measurement."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).resolve().parents[2]
END_S = 5.0  # seconds to end after the last question
LAST_WORDS = 300  # characters of its stderr that are shown


class PlayerError(Exception):
    """Why a contestant has no figure, in one line."""


@dataclass(frozen=True)
class Player:
    """A contestant: ``python`` runs ``script`` as ``ranks`` processes with the rank variables that
    torchrun sets. ``options``: the script's first line; ``env``: variables of its own."""

    name: str
    python: Path
    script: str
    options: Mapping[str, Any]
    ranks: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 420.0


class Job:
    """A running contestant. ``ask`` goes to all its ranks, and all answer."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self._log = tempfile.TemporaryFile()
        self._answers: list[queue.Queue[str]] = []
        self._processes: list[subprocess.Popen[str]] = []
        port = _free_port()
        for rank in range(player.ranks):
            process = subprocess.Popen(
                [str(player.python), str(SCRIPTS / player.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=_environment(player, rank, port),
                cwd=ROOT,
                start_new_session=True,
            )
            answers: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_read, args=(process, answers), daemon=True).start()
            self._processes.append(process)
            self._answers.append(answers)
        try:
            self.ask(dict(player.options), player.start_s)
        except BaseException:  # an interrupt as well: nobody else knows these processes yet
            self.close()
            raise

    def ask(self, case: Mapping[str, Any], limit_s: float) -> list[dict[str, Any]]:
        """The answers of all ranks. Raises ``PlayerError`` when one fails or is late; the job is of
        no more use then."""
        self._signal(signal.SIGCONT)
        deadline = time.monotonic() + limit_s
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps(case) + "\n")
                process.stdin.flush()
        except OSError as err:
            raise PlayerError(f"it has ended: {self._last_words()}") from err
        found = []
        for answers in self._answers:
            try:
                line = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise PlayerError(f"no answer within {limit_s:.0f} s") from None
            if not line:
                raise PlayerError(f"it has ended: {self._last_words()}")
            found.append(json.loads(line))
        self._signal(signal.SIGSTOP)
        for answer in found:
            if "error" in answer:
                raise PlayerError(answer["error"])
        return found

    def close(self) -> None:
        """End its processes, by asking first."""
        self._signal(signal.SIGCONT)
        for process in self._processes:
            try:
                assert process.stdin is not None
                process.stdin.close()
            except OSError:
                pass
        deadline = time.monotonic() + END_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            try:
                os.killpg(process.pid, number)  # each is a session of its own
            except ProcessLookupError:
                pass

    def _last_words(self) -> str:
        # Not by ``read``: the children write at the position that it would move.
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return " / ".join(lines[-2:])[-LAST_WORDS:]


def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(player: Player, rank: int, port: int) -> dict[str, str]:
    keep = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    own = {name: os.environ[name] for name in keep if name in os.environ}
    own["PATH"] = f"{player.python.parent}:{own.get('PATH', '')}"
    threads = str(player.options.get("threads", 1))
    return {
        **own,
        "PYTHONPATH": str(ROOT) if player.script.startswith("ds_cp") else "",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(player.ranks),
        "LOCAL_WORLD_SIZE": str(player.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        **player.env,
    }
