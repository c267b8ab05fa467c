"""One job under every launcher: the same tokens, and nothing left of it, however it ends."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import END_S, START_S, Job, command, json_lines, post
from tests.helpers.tiny import LONG, NEW, write_prompts
from tests.launch.conftest import Start, Write

LAUNCHERS = ("python", "deepspeed", "torchrun", "mpirun", "ds-cp")
SERVER_KV = {"tokens_per_rank": 512, "block_size": 16}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_generate(
    launcher: str, start: Start, config: Write, tmp_path: Path, expected: list[list[int]]
) -> None:
    """Four ranks of a quarter of the room each (one rank of all of it under plain python)."""
    ranks = 1 if launcher == "python" else 4
    assert len(LONG) > 2 * 64  # of one rank
    file = config(kv_cache={"tokens_per_rank": 256 // ranks, "block_size": 16})
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    args = ["--config", file, "--prompts-file", prompts, "--max-tokens", str(NEW), "--json"]
    job = start(command(launcher, "generate", ranks, args))

    assert job.wait(START_S) == 0, job.story()
    job.gone(END_S)
    outputs = json_lines(job.out)
    assert [o["outputs"][0]["token_ids"] for o in outputs] == expected, job.story()
    assert [o["metrics"]["modes"] == ["local"] for o in outputs] == [
        True,
        launcher == "python",
        True,
    ], job.story()
    others = [line for line in job.out.splitlines() if not line.startswith("{")]
    if launcher == "deepspeed":  # its launcher logs there, a time stamp first
        others = [line for line in others if line and not line.startswith("[20")]
    assert not others, job.story()
    assert job.err.count(f"ranks: {ranks} = cp {ranks} x tp 1") == 1, job.story()
    assert "Traceback" not in job.err, job.story()


class Stream:
    """A long completion, read in a thread: its events, or how it failed."""

    def __init__(self, url: str, tokens: int = 400) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None
        self._begun = threading.Event()
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True}
        self._request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"temperature": 0, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._begun.wait(60), "the stream did not begin"
        assert self._thread.is_alive(), (self.events, self.error)

    def _read(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=60) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        self.events.append(line[6:].decode().strip())
                        self._begun.set()
        except (OSError, urllib.error.URLError) as err:
            self.error = err
        finally:
            self._begun.set()

    def ended(self) -> list[str]:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the stream has no end"
        return self.events

    def was_finished(self) -> bool:
        events = self.ended()
        choices = [json.loads(event).get("choices") for event in events if event != "[DONE]"]
        reason = choices[-1][0]["finish_reason"] if choices and choices[-1] else None
        return events[-1:] == ["[DONE]"] and reason == "length"

    def was_told(self) -> bool:
        """Its last event but [DONE] is an error, not a silence."""
        events = [event for event in self.ended() if event != "[DONE]"]
        return bool(events) and "error" in json.loads(events[-1])


def serving(start: Start, config: Write, launcher: str, **sections: Any) -> tuple[Job, str]:
    """A server that has answered one request."""
    job = begin(start, config, launcher, **sections)
    url = job.ready()
    answer = post(f"{url}/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 3})
    assert answer["usage"]["completion_tokens"] <= 3 and answer["choices"], job.story()
    return job, url


def loading(start: Start, config: Write, launcher: str) -> Job:
    """A server all of whose workers have been started, and none is ready."""
    job = begin(start, config, launcher)
    ranks = 1 if launcher == "python" else 2
    job.until("workers", lambda: len(job.matching("serve.worker_process")) == ranks, START_S)
    assert "ds_cp ready" not in job.out
    return job


def begin(start: Start, config: Write, launcher: str, **sections: Any) -> Job:
    file = config(kv_cache=SERVER_KV, **sections)
    return start(command(launcher, "serve", 1 if launcher == "python" else 2, ["--config", file]))


# Every launcher gets each signal once: one while it serves, the other while its workers load.
# SIGTERM with requests in flight is in test_drain.


@pytest.mark.parametrize("launcher", ["python", "torchrun", "ds-cp"])
def test_ctrl_c_while_loading(launcher: str, start: Start, config: Write) -> None:
    job = loading(start, config, launcher)
    job.interrupt()
    job.gone(END_S)
    assert "ds_cp: error" not in job.err, job.story()


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_ctrl_c_while_serving(launcher: str, start: Start, config: Write) -> None:
    job, url = serving(start, config, launcher)
    stream = Stream(url)
    job.interrupt()
    job.gone(END_S)
    stream.ended()
    if launcher == "deepspeed":
        told = stream.was_told() and '"shutting_down"' in "".join(stream.events)
        assert stream.was_finished() or told, (stream.events[-3:], job.story())
    assert "ds_cp: error" not in job.err, job.story()


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_sigterm_while_loading(launcher: str, start: Start, config: Write) -> None:
    """deepspeed's first process ends alone (DeepSpeed issue 4098): the ranks have to notice."""
    job = loading(start, config, launcher)
    job.process.terminate()
    job.gone(END_S)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "mpirun"])
def test_sigkill_to_the_launcher(launcher: str, start: Start, config: Write) -> None:
    job = loading(start, config, launcher)
    job.process.kill()
    job.gone(END_S)


def test_sigkill_to_the_launcher_while_serving(start: Start, config: Write) -> None:
    """Also where the launcher's process stays behind as a zombie, and with a request in flight."""
    job, url = serving(start, config, "torchrun")
    Stream(url)
    job.process.kill()  # not reaped before all others are gone
    job.until("ranks gone", lambda: all(p.pid == job.process.pid for p in job.processes()), END_S)
    job.gone(END_S)


def test_sigkill_to_a_worker(start: Start, config: Write) -> None:
    """Of the only rank, during a drain, where none is replaced; test_drain has those of other
    ranks."""
    job, url = serving(start, config, "python", fault_tolerance={"max_restarts": 0})
    stream = Stream(url)
    (worker,) = job.matching("serve.worker_process", 0)
    job.process.terminate()
    job.until("its drain", lambda: "SIGTERM: stopping" in job.err, END_S)
    worker.kill()
    job.gone(END_S)
    assert job.process.returncode not in (0, 2), job.story()
    (line,) = [line for line in job.err.splitlines() if "worker of rank" in line]
    begins = "ds_cp: error: the worker of rank 0 was ended by SIGKILL (out of memory?) (noticed "
    assert line.startswith(begins) and line.endswith(" s), during the drain"), job.story()
    assert stream.was_told(), (stream.events[-3:], stream.error)
    assert '"engine_dead"' in stream.events[-2], job.story()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_generate_is_interrupted(
    number: signal.Signals, start: Start, config: Write, tmp_path: Path
) -> None:
    """In the middle of a step, with ranks that wait for each other in a collective."""
    line = json.dumps({"prompt": LONG, "ignore_eos": True})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f"{line}\n" * 50)
    file = config(
        kv_cache=SERVER_KV, context_parallel={"mode": "tree"}, scheduler={"max_num_seqs": 1}
    )
    args = ["--config", file, "--prompts-file", str(prompts), "--max-tokens", "300", "--json"]
    job = start(command("ds-cp", "generate", 2, args))
    job.until("summary", lambda: "\nKV: " in job.err, START_S)
    if number == signal.SIGINT:
        job.interrupt()
    else:
        job.process.terminate()
    job.gone(END_S)
    assert job.process.returncode == (130 if number == signal.SIGINT else 143), job.story()
    assert "Traceback" not in job.err and "ds_cp: error" not in job.err, job.story()
    assert job.out == "", job.story()
