"""A real worker leaves a fork server behind; another worker comes of it after its death."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_cp.config import Config, load_config
from ds_cp.errors import EngineDeadError
from ds_cp.plan import Begin, Chunk, Sampling, StepPlan, Stop
from ds_cp.serve.channel import FromWorker, Ready, Result, Resumed
from ds_cp.serve.detached import can_fork_servers
from ds_cp.serve.forking import Forks
from ds_cp.serve.orders import Loaded, Meet, Met, Word
from ds_cp.serve.worker_child import Child, forked_child, worker_child
from ds_cp.topology.job import Job, detect
from tests.helpers.tiny import make_tiny_model

pytestmark = pytest.mark.skipif(not can_fork_servers(), reason="not on this system")
LIMIT_S = 120.0  # on a busy machine


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def make(tmp_path: Path, **more: Any) -> tuple[Config, Job]:
    config = load_config(
        {"model": str(make_tiny_model(tmp_path / "model")),
         "kv_cache": {"tokens_per_rank": 64, "block_size": 16}, **more}
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_CP_LAUNCHER": "ds-cp",
    }  # fmt: skip
    return config, detect({name: str(value) for name, value in place.items()}, timeout_s=60)


def received(child: Child) -> FromWorker:
    child.channel.sock.settimeout(LIMIT_S)
    message: FromWorker = child.channel.receive(FromWorker)
    return message


def said(child: Child) -> Word:
    assert child.orders is not None
    child.orders.sock.settimeout(LIMIT_S)
    word: Word = child.orders.receive(Word)
    return word


def until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


def step(child: Child, generation: int) -> tuple[int, ...]:
    """The token that the worker draws after three."""
    begin = Begin(1, (5, 6, 7), 4, (), 0, Sampling(temperature=0.0))
    chunk = Chunk(1, "local", "kv", ((0, ((0, 3),)),), ((0, 0),), True)
    child.channel.send_plan(StepPlan(1, begins=(begin,), chunks=(chunk,)), generation)
    result = received(child)
    assert isinstance(result, Result)
    return tuple(one.token for one in result.outcome.sampled)


def replaced(job: Job, forks: Forks, stack: ExitStack, generation: int) -> Child:
    """A forked worker that has met everybody, which is nobody."""
    child = stack.enter_context(forked_child(job, forks))
    assert said(child) == Loaded() and child.orders is not None
    child.orders.send(Meet(generation))
    assert said(child) == Met(generation)
    assert received(child) == Resumed(generation, (generation,))
    return child


def test_workers_are_forked_one_after_the_other(tmp_path: Path, stack: ExitStack) -> None:
    """With an OpenMP pool of two threads in each worker, and none in the server."""
    config, job = make(tmp_path, threads_per_rank=2)
    forks = Forks()
    stack.callback(forks.close)
    child = stack.enter_context(worker_child(config, job, outlives=True, forks=forks))
    ready = received(child)
    assert isinstance(ready, Ready)
    assert forks.is_serving, forks.why
    assert forks._server is not None
    server = psutil.Process(forks._server.pid)
    expected = step(child, 0)
    forks.settle(ready.facts)
    fds = []
    for generation in range(1, 4):
        child.process.kill()
        assert child.process.wait(LIMIT_S) == -signal.SIGKILL
        child = replaced(job, forks, stack, generation)
        assert step(child, generation) == expected
        process = psutil.Process(child.process.pid)
        fds.append(process.num_fds())
        assert process.ppid() == os.getpid()
        assert "ds_cp.serve.worker_process" in process.cmdline()
        assert server.num_threads() == 1 and "ds_cp.serve.fork_server" in server.cmdline()
    assert len(set(fds)) == 1, "descriptors of those before stay open"
    folder = Path(f"/proc/{server.pid}/fd")
    opened = [os.readlink(one) for one in folder.iterdir()]
    assert len([one for one in opened if one.startswith("socket:")]) == 1, opened

    # A worker's own end is seen as that of any child.
    child.channel.send_plan(Stop(), 3)
    assert child.process.wait(LIMIT_S) == 0
    child = replaced(job, forks, stack, 4)

    # The server's end is not the worker's; it is known at once.
    server.kill()
    until(lambda: not forks.is_open)
    assert step(child, 4) == expected
    with pytest.raises(EngineDeadError, match="there is no fork server"):
        stack.enter_context(forked_child(job, forks))


def test_a_server_that_stands_still(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds_cp.serve.forking.FORK_S", 0.2)
    config, job = make(tmp_path)
    forks = Forks()
    stack.callback(forks.close)
    child = stack.enter_context(worker_child(config, job, outlives=True, forks=forks))
    assert isinstance(received(child), Ready) and forks._server is not None
    os.kill(forks._server.pid, signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match="did not answer"):
        stack.enter_context(forked_child(job, forks))
    until(lambda: not psutil.pid_exists(forks._server.pid) if forks._server else True)
    assert child.process.poll() is None


def test_no_server_where_the_model_cannot_be_loaded(tmp_path: Path, stack: ExitStack) -> None:
    """The error is the one that the ranks agree on."""
    config, job = make(tmp_path, linear_layers="torch")
    (tmp_path / "model" / "model.safetensors").unlink()
    forks = Forks()
    stack.callback(forks.close)
    child = stack.enter_context(worker_child(config, job, outlives=True, forks=forks))
    failed = received(child)
    assert not isinstance(failed, Ready)
    assert child.process.wait(LIMIT_S) == 2
    until(lambda: not forks.is_open)
    assert "not loaded" in forks.why
