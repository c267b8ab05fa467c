"""A server under every launcher, with requests in flight: a stop lets them finish or tells them,
a failure is named by its cause first, and nothing but loopback listens that need not.

A start costs seconds, so each server is asked all that its end does not spoil.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_cp.process import SAME_S
from tests.helpers.jobs import END_S, Job, command
from tests.launch.conftest import Start, Write
from tests.launch.test_launchers import Stream

KV = {"tokens_per_rank": 4096, "block_size": 16}  # room for all at once on one rank
WIDTH = 15  # requests in flight
LONG_ENOUGH = 60  # tokens of each, a second or more on two cores
ENDS = {"max_restarts": 0}  # the first death ends the job
DRAIN_S = 25.0  # server.drain_timeout_s


class Whole:
    """A completion that is not streamed, in a thread: its status and body."""

    def __init__(self, url: str, tokens: int) -> None:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True}
        self.status, self.body, self.error = 0, dict[str, Any](), ""
        self._request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=90) as answer:
                self.status, self.body = answer.status, json.load(answer)
        except urllib.error.HTTPError as err:
            self.status, self.body = err.code, json.load(err)
        except (OSError, http.client.HTTPException) as err:
            self.error = repr(err)

    def code(self) -> str:
        """The error's code; "" for a whole answer."""
        self._thread.join(90)
        assert not self.error and self.status, self.error or "no answer"
        if self.status == 200:
            assert self.body["choices"][0]["finish_reason"] == "length"
            return ""
        assert self.status == 503, self.body
        return str(self.body["error"]["code"])


def code_of(stream: Stream) -> str:
    """The code of the stream's error event; "" when it finished."""
    if stream.was_finished():
        return ""
    events = [event for event in stream.ended() if event != "[DONE]"]
    assert events and "error" in json.loads(events[-1]), (events[-2:], stream.error)
    return str(json.loads(events[-1])["error"]["code"])


def begin(
    start: Start, config: Write, launcher: str, ranks: int = 2, **sections: Any
) -> tuple[Job, str]:
    # One thread: two that spin in each of two ranks take many times as long on a busy machine.
    args = ["--config", config(kv_cache=KV, threads_per_rank=1, **sections)]
    job = start(command(launcher, "serve", 1 if launcher == "python" else ranks, args))
    return job, job.ready()


def flood(url: str, tokens: int = LONG_ENOUGH) -> Callable[[], list[str]]:
    """Begin ``WIDTH`` requests, a third of them not streamed; returns what their codes were."""
    wholes = [Whole(url, tokens) for _ in range(WIDTH // 3)]
    streams: list[Stream] = []

    def one() -> None:
        streams.append(Stream(url, tokens))

    threads = [threading.Thread(target=one) for _ in range(WIDTH - len(wholes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(streams) == len(threads)
    return lambda: [code_of(stream) for stream in streams] + [whole.code() for whole in wholes]


def ds_cp_lines(job: Job, since: int = 0) -> list[str]:
    """What ds_cp said after the first ``since`` characters, of requests apart."""
    lines = [line for line in job.err[since:].splitlines() if line.startswith("ds_cp: ")]
    return [line for line in lines if not line.startswith("ds_cp: request ")]


DRAINING = ", during the drain"


def drains(job: Job) -> None:
    """SIGTERM to the launcher, up to the drain."""
    job.process.terminate()
    job.until("its drain", lambda: "stopping; requests in flight get" in job.err, END_S)


def listening(processes: list[psutil.Process]) -> set[tuple[int, str]]:
    """(process, address) that are open beyond loopback."""
    return {
        (process.pid, connection.laddr.ip)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and not ipaddress.ip_address(connection.laddr.ip).is_loopback
    }


def hurry(job: Job, launcher: str) -> None:
    """By a second SIGTERM, which no launcher passed on, or by Ctrl-C on another rank alone."""
    if launcher == "python":
        time.sleep(SAME_S)
        job.process.terminate()
    else:
        (rank,) = [p for p in job.matching("", 1) if "ds_cp.serve." not in " ".join(p.cmdline())]
        rank.send_signal(signal.SIGINT)


@pytest.mark.parametrize("launcher", ["python", "ds-cp", "torchrun", "deepspeed", "mpirun"])
def test_sigterm_with_requests_in_flight(launcher: str, start: Start, config: Write) -> None:
    """To the launcher. deepspeed's first process ends at once (DeepSpeed issue 4098), so that its
    end has to be the signal; mpirun kills a quarter of a second after its SIGTERM. With two of them
    one request does not finish, and is told when the server is hurried, whatever the ranks do:
    here they stand still."""
    job, url = begin(start, config, launcher)

    workers = job.matching("serve.worker_process")
    ranks = {*workers, *(worker.parent() for worker in workers)}
    assert listening([process for process in ranks if process is not None]) == set()
    opened = {pid for pid, _ in listening(job.processes())}
    notes = [line for line in ds_cp_lines(job) if ": note: " in line]
    assert bool(opened) == (launcher in ("torchrun", "mpirun")), job.story()
    assert len(notes) == len(opened), job.story()
    assert all(f"(process {pid}) listens on *:" in notes[0] for pid in opened), job.story()

    hurries = launcher in ("python", "ds-cp")
    last = Stream(url, 480) if hurries else None
    codes = flood(url, 400 if launcher == "mpirun" else LONG_ENOUGH)
    if hurries:
        drains(job)  # any rank may have had the signal first
    job.process.terminate()  # at once after one: the same one, for all that a server can know
    told = "shutting_down" if launcher == "mpirun" else ""
    assert codes() == [told] * WIDTH, job.story()
    if last is not None:
        workers[0].suspend()
        hurry(job, launcher)
        assert code_of(last) == "shutting_down", job.story()
    job.gone(DRAIN_S + END_S)
    if hurries:
        assert job.process.returncode == 0, job.story()
    if launcher != "mpirun":  # which cuts what its ranks say then
        said = [line for line in ds_cp_lines(job) if "stopping" in line]
        cause = r"SIGTERM"
        if launcher == "deepspeed":
            cause = rf"the launcher deepspeed \(process {job.process.pid}\) has ended"
        assert re.match(
            f"ds_cp: {cause}( on rank 1)?: stopping; requests in flight get up to 25 s", said[0]
        )
        assert ["are told" in line for line in said] == [False, *[True] * hurries], job.story()
    assert "ds_cp: error" not in job.err, job.story()


@pytest.mark.parametrize("launcher", ["ds-cp", "deepspeed", "mpirun"])
def test_a_killed_worker_is_named_first(launcher: str, start: Start, config: Write) -> None:
    """Of another rank; by ds-cp during a drain. Where none is replaced."""
    job, url = begin(start, config, launcher, fault_tolerance=ENDS)
    codes = flood(url, tokens=400)
    if launcher == "ds-cp":
        drains(job)
    before = len(job.err)
    (worker,) = job.matching("serve.worker_process", 1)
    worker.kill()
    found = codes()
    assert "engine_dead" in found and set(found) <= {"", "engine_dead"}, job.story()
    job.until("its end", lambda: "ds_cp: error" in job.err, END_S)
    lines = job.err[before:].splitlines()
    first = next(x for x in lines if x.strip() and not x.startswith("ds_cp: request "))
    assert re.fullmatch(
        r"ds_cp: error: the worker of rank 1 was ended by SIGKILL \(out of memory\?\) "
        r"\(noticed within [\d.]+ s\)" + (DRAINING if launcher == "ds-cp" else ""),
        first,
    ), job.story()
    job.gone(3 * END_S)
    assert job.process.returncode not in (0, 2), job.story()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_supervisor_is_named_first(rank: int, start: Start, config: Write) -> None:
    """Of rank 0 while it serves, of another rank during a drain."""
    job, url = begin(start, config, "torchrun" if rank else "deepspeed")
    stream = Stream(url, 480)
    if rank:
        drains(job)
    before = len(job.err)
    (worker,) = job.matching("serve.worker_process", rank)
    supervisor = worker.parent()
    assert supervisor is not None
    supervisor.kill()
    job.until("its end", lambda: "ds_cp: error" in job.err, END_S)
    said = ds_cp_lines(job, before)
    want = f"ds_cp: error: the supervisor of rank {rank} (process {supervisor.pid}) was killed"
    assert said[0] == want + (DRAINING if rank else ""), job.story()
    if rank != 0:
        assert code_of(stream) == "engine_dead"
    job.gone(3 * END_S)


FULL = """
import os, sys
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_dead_worker_ends_a_server_that_can_say_nothing(
    start: Start, config: Write, tmp_path: Path
) -> None:
    """Neither the server nor ds-cp itself may wait for words: here for a pipe that is full."""
    read, write = os.pipe()
    file = tmp_path / "full.py"
    file.write_text(FULL)
    argv = command(
        "ds-cp",
        "serve",
        2,
        ["--config", config(kv_cache=KV, threads_per_rank=1, fault_tolerance=ENDS)],
    )
    try:
        filled = " ".join([sys.executable, str(file), *argv])
        job = start(["bash", "-c", f"exec 2>/proc/{os.getpid()}/fd/{write}; exec {filled}"])
        url = job.ready()
        stream = Stream(url, 400)
        job.matching("serve.worker_process", 0)[0].kill()
        assert code_of(stream) in ("", "engine_dead")
        job.gone(END_S)
        assert job.process.returncode == 1, job.story()
    finally:
        os.close(read)
        os.close(write)
