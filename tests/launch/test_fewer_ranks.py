"""A server whose ranks lose their supervisors: it goes on with those that are left, every stream
with the same tokens, and takes a rank back that is started again."""

from __future__ import annotations

import psutil

from tests.helpers.jobs import Job, command
from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG
from tests.launch.conftest import Start, Write
from tests.launch.test_generations import MEND_S, SEEDED, TWICE, WRITTEN, begun

KV = {"tokens_per_rank": 160, "block_size": 16}
SPANS = {"prompt": LONG, "max_tokens": 120, "temperature": 0}  # two ranks hold it
ALL = {"prompt": LONG, "max_tokens": 260, "temperature": 0}  # it needs three


def supervisor_of(job: Job, rank: int) -> psutil.Process:
    """The launcher, which has no rank, would be found as rank 0's."""
    [found] = job.matching(" serve ", rank)
    return found


def admitted(job: Job, url: str) -> Stream | None:
    """A stream that needs all ranks, once the engine knows that they are here."""
    stream = Stream(url, ALL)
    job.until("tokens", lambda: stream.count >= 5 or stream.is_over, 60)
    return None if stream.errors else stream


def test_a_killed_supervisor_costs_no_token(start: Start, config: Write) -> None:
    file = config(kv_cache=KV, threads_per_rank=1, fault_tolerance={"min_ranks": 2})
    job = start(command("ds-cp", "serve", 3, ["--config", file]))
    url = job.ready()
    bodies = [SPANS, SEEDED, TWICE, WRITTEN]
    expected = [Stream(url, body).end() for body in bodies]
    large = Stream(url, ALL).end()
    for times in (1, 2):
        streams = [Stream(url, body) for body in bodies]
        begun(job, streams, 5)
        supervisor_of(job, 2).kill()
        for stream, want in zip(streams, expected, strict=True):
            assert stream.end() == want, job.story()
        said = f"all ranks have met again (generation {2 * times}"
        job.until("its return", lambda: said in job.err, 2 * MEND_S)  # noqa: B023
        assert f"2 of 3 ranks, without rank 2 have met again (generation {2 * times - 1}" in job.err
    assert "the job goes on with 2 of 3 ranks, without rank 2: KV for 320 tokens" in job.err
    assert "rank 2 was ended by SIGKILL (out of memory?); it is started again" in job.err
    # One that needs all is told so; it fits again later.
    stream = job.until("room", lambda: admitted(job, url), MEND_S)
    supervisor_of(job, 1).kill()
    job.until("its refusal", lambda: stream.is_over, 60)
    [error] = stream.errors
    assert "rank 1 is away" in str(error) and "hold 320" in str(error), error
    job.until("its return", lambda: "all ranks have met again (generation 6" in job.err, 2 * MEND_S)
    stream = job.until("room", lambda: admitted(job, url), MEND_S)
    assert stream.end() == large, job.story()
    job.process.terminate()
    job.gone(30)
    assert job.process.returncode == 0, job.story()
