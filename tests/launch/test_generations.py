"""A server of several ranks whose workers are killed: every stream goes on with the tokens that it
gets undisturbed."""

from __future__ import annotations

import urllib.request

import psutil
import pytest

from tests.helpers.jobs import Job, command
from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG
from tests.launch.conftest import Start, Write

KV = {"tokens_per_rank": 304, "block_size": 16}  # so that LONG and its answer need both ranks
MEND_S = 60.0  # seconds for a new worker, which imports torch, on a machine that does nothing else
GREEDY = {"prompt": LONG, "max_tokens": 300, "temperature": 0}
SEEDED = {"prompt": "Hi", "max_tokens": 120, "temperature": 1.0, "seed": 5, "logprobs": 2}
TWICE = {"prompt": "One", "max_tokens": 60, "temperature": 0.8, "seed": 3, "n": 2,
         "presence_penalty": 0.5}  # fmt: skip
WRITTEN = {"prompt": "Say", "max_tokens": 50, "temperature": 1.0, "seed": 9, "ignore_eos": False,
           "structured_outputs": {"regex": "[a-f]{200}"}}  # fmt: skip


def begun(job: Job, streams: list[Stream], events: int) -> None:
    job.until("tokens", lambda: all(one.count >= events or one.errors for one in streams), 60)
    assert not any(one.is_over for one in streams[:1]), "it was over before it was disturbed"


def worker_of(job: Job, rank: int) -> psutil.Process:
    """The older process of the rank; the younger one, where there is one, waits to replace it."""
    return min(job.matching("serve.worker_process", rank), key=psutil.Process.create_time)


@pytest.mark.parametrize(("rank", "serves"), [(1, True), (0, True), (1, False)])
def test_a_killed_worker_costs_no_token(
    rank: int, serves: bool, start: Start, config: Write
) -> None:
    """Forked from a server, and a new process where that has died; which has a server again."""
    file = config(kv_cache=KV, threads_per_rank=1)
    job = start(command("ds-cp", "serve", 2, ["--config", file]))
    url = job.ready()
    bodies = [GREEDY, SEEDED, TWICE, WRITTEN]
    expected = [Stream(url, body).end() for body in bodies]
    survivor = worker_of(job, 1 - rank)
    for times in range(1, 3):
        streams = [Stream(url, body) for body in bodies]
        begun(job, streams, 10)
        if not serves and times == 1:
            for server in job.matching("serve.fork_server", rank):
                server.kill()
        worker_of(job, rank).kill()
        for stream, want in zip(streams, expected, strict=True):
            assert stream.end() == want, job.story()
        said = f"all ranks have met again (generation {times}"
        job.until("its line", lambda: said in job.err, MEND_S)  # noqa: B023
        print(rank, [round(stream.longest, 2) for stream in streams], job.err[-500:])
        assert len(job.matching("serve.fork_server")) == 2, job.story()
    assert worker_of(job, 1 - rank) == survivor, "it was not kept"
    job.process.terminate()
    job.gone(30)
    assert job.process.returncode == 0, job.story()


def test_host_memory_beside_a_death(start: Start, config: Write) -> None:
    """Prompts that take turns in the KV of two ranks, and come back from host memory, before and
    after a worker is killed among them. The new one has as much host memory, and it is empty."""
    kv = {**KV, "host_memory_per_rank": "4MiB"}
    file = config(kv_cache=kv, threads_per_rank=1)
    job = start(command("ds-cp", "serve", 2, ["--config", file]))
    url = job.ready()
    bodies = [{**GREEDY, "max_tokens": 100, "cache_salt": salt} for salt in "abcd"]
    want = Stream(url, bodies[0]).end()

    def metric(name: str) -> float:
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"ds_cp:{name}"))

    for body in [*bodies[1:], *bodies]:
        assert Stream(url, body).end() == want, job.story()
    spilled = metric("host_blocks_spilled_total")
    assert spilled > 0
    for _ in range(2):
        streams = [Stream(url, body) for body in bodies]
        begun(job, streams[:1], 5)
        worker_of(job, 1).kill()
        assert [stream.end() for stream in streams] == [want] * 4, job.story()
    for body in [*bodies, *bodies]:
        assert Stream(url, body).end() == want, job.story()
    assert metric("host_blocks_spilled_total") > spilled and metric("host_blocks_failed_total") == 0
    print(
        "restored", metric("host_blocks_restored_total"), "hits", metric("prefix_cache_host_hits")
    )
    job.process.terminate()
    job.gone(30)
    assert job.process.returncode == 0, job.story()


def test_a_worker_that_stands_still_is_replaced(start: Start, config: Write) -> None:
    """It is stopped, not dead: its peers wait for it, and it gives no sign of life."""
    tolerance = {"spare_after_s": None, "hang_s": 3}
    file = config(kv_cache=KV, threads_per_rank=1, fault_tolerance=tolerance)
    job = start(command("ds-cp", "serve", 2, ["--config", file]))
    url = job.ready()
    expected = Stream(url, GREEDY).end()
    stream = Stream(url, GREEDY)
    begun(job, [stream], 10)
    worker_of(job, 1).suspend()
    assert stream.end() == expected, job.story()
    assert "the worker of rank 1 gave no sign of life for 3 s and was ended" in job.err, job.story()


def test_deaths_in_a_row_end_the_server(start: Start, config: Write) -> None:
    """Every new worker dies, as by a fault of the machine: the cause is said, and all ends. There
    is no fork server, so that the second one dies while it loads."""
    tolerance = {"spare_after_s": None, "max_restarts": 1}
    file = config(kv_cache=KV, threads_per_rank=1, fault_tolerance=tolerance)
    job = start(command("ds-cp", "serve", 2, ["--config", file]))
    url = job.ready()
    stream = Stream(url, GREEDY)
    begun(job, [stream], 10)
    for server in job.matching("serve.fork_server", 1):
        server.kill()
    killed = worker_of(job, 1)
    killed.kill()

    def another() -> list[psutil.Process]:
        return [p for p in job.matching("serve.worker_process", 1) if p != killed]

    [second] = job.until("another worker", another, MEND_S)
    second.kill()
    job.gone(30)
    assert job.process.returncode == 1, job.story()
    line = next(line for line in job.err.splitlines() if line.startswith("ds_cp: error"))
    assert "the worker of rank 1 was ended by SIGKILL" in line, line
    assert "after 1 interruption in a row without a step done" in line, line
    assert stream.errors, "the client was not told"


@pytest.mark.parametrize("launcher", ["torchrun"])
def test_another_launcher_without_shared_memory(launcher: str, start: Start, config: Write) -> None:
    """torchrun keeps the store; ranks exchange by gloo; the drain goes on over the death."""
    file = config(kv_cache=KV, threads_per_rank=1, comm={"shared_memory": False})
    job = start(command(launcher, "serve", 2, ["--config", file]))
    url = job.ready()
    expected = Stream(url, GREEDY).end()
    stream = Stream(url, GREEDY)
    begun(job, [stream], 5)
    worker_of(job, 1).kill()
    assert stream.end() == expected, job.story()
    stream = Stream(url, GREEDY)
    begun(job, [stream], 5)
    job.process.terminate()
    job.until("its drain", lambda: "stopping; requests in flight get" in job.err, 30)
    worker_of(job, 0).kill()
    assert stream.end() == expected, job.story()
    job.gone(60)
    assert "ds_cp: error" not in job.err, job.story()


def test_the_only_worker_is_killed(start: Start, config: Write) -> None:
    """A server of one rank has no peers to meet, and its requests go on all the same."""
    job = start(command("python", "serve", 1, ["--config", config(kv_cache=KV)]))
    url = job.ready()
    bodies = [SEEDED, WRITTEN]
    expected = [Stream(url, body).end() for body in bodies]
    streams = [Stream(url, body) for body in bodies]
    begun(job, streams, 5)
    worker_of(job, 0).kill()
    for stream, want in zip(streams, expected, strict=True):
        assert stream.end() == want, job.story()
