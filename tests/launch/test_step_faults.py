"""A fault in one request's steps, on one rank of a real server: that request ends, or its step is
done again, and all other streams go on with the tokens that they get undisturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from tests.helpers.jobs import command
from tests.helpers.step_faults import faulty_environment, prompt_of
from tests.helpers.streams import LIMIT_S, Stream
from tests.launch.conftest import Start, Write
from tests.launch.test_generations import GREEDY, KV, SEEDED, WRITTEN, begun

OTHERS: list[dict[str, Any]] = [GREEDY, SEEDED, WRITTEN]
SHORT = {"max_tokens": 8, "temperature": 0}


def ended(stream: Stream) -> dict[str, Any]:
    """The error with which a stream has ended."""
    stream._thread.join(LIMIT_S)
    assert stream.is_over
    (err,) = stream.errors  # an event of its own, or before the first one a status
    error: dict[str, Any] = (json.load(err) if isinstance(err, HTTPError) else err)["error"]
    return error


def test_a_fault_ends_its_request_or_its_step(start: Start, config: Write, tmp_path: Path) -> None:
    file = config(kv_cache=KV, threads_per_rank=1)
    args = command("ds-cp", "serve", 2, ["--config", file])
    job = start(args, faulty_environment(tmp_path))
    url = job.ready()
    expected = [Stream(url, body).end() for body in OTHERS]

    def disturb(kind: str) -> Stream:
        streams = [Stream(url, body) for body in OTHERS]
        begun(job, streams, 5)
        faulty = Stream(url, {"prompt": prompt_of(kind), **SHORT})
        for stream, want in zip(streams, expected, strict=True):
            assert stream.end() == want, (kind, job.story())
        return faulty

    # An exception in a kernel, once: the step is done again.
    assert len(disturb("raise_once").end()) == 1
    assert "RuntimeError: made up, in a kernel" in job.err, job.story()
    assert " on " in next(line for line in job.err.splitlines() if "the ranks meet again" in line)
    # An allocation that fails, each time: its request is told.
    assert ended(disturb("no_memory"))["code"] == "request_steps_fail"
    [said] = [line for line in job.err.splitlines() if "is ended: its steps have failed" in line]
    assert "their sha256 begins with" in said and "memory" in said, said
    # Logits that are no numbers: nothing is interrupted.
    before = job.err.count("have met again")
    assert ended(disturb("nan"))["code"] == "engine_error"
    assert job.err.count("have met again") == before
    # A prompt that kills whoever computes it.
    assert ended(disturb("kill"))["code"] == "request_steps_fail"
    killed = [line for line in job.err.splitlines() if "was ended by SIGKILL" in line]
    assert 2 <= len(killed) <= 6, killed
    # Alone in flight it is found at the second time.
    assert ended(Stream(url, {"prompt": prompt_of("kill"), **SHORT}))["code"] == (
        "request_steps_fail"
    )
    job.process.terminate()
    job.gone(30)
    assert job.process.returncode == 0, job.story()
