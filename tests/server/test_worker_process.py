"""Two worker processes over their channels, with plans that one rank cannot run."""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from ds_cp.config import load_config
from ds_cp.plan import Begin, Chunk, Idle, Plan, Sampling, StepPlan
from ds_cp.serve.channel import Channel, Failed, FromWorker, Ready, Result
from ds_cp.serve.worker_child import describe_end, worker_child
from ds_cp.topology.job import detect
from tests.helpers.tiny import make_tiny_model

AT_ONCE_S = 40.0  # on a busy machine; comm.timeout_s is 120
START_S = 120.0
NOT_A_TOKEN = 10**6


def one_token(step: int, token: int, mode: str, owner: int) -> Plan:
    """A request of one token, which ``owner`` computes while the KV is on the other rank."""
    begin = Begin(step, (token,), 1, (), 0, Sampling(temperature=0.0))
    home = owner if mode == "local" else 1 - owner
    chunk = Chunk(step, mode, "kv", ((owner, ((0, 1),)),), ((home, 0),), True)
    return StepPlan(step, begins=(begin,), chunks=(chunk,))


def received(channel: Channel, seconds: float) -> FromWorker:
    channel.sock.settimeout(seconds)
    message: FromWorker = channel.receive(FromWorker)
    return message


@pytest.mark.parametrize(("mode", "failing"), [("local", 1), ("tree", 0)])
def test_a_failed_step_is_reported_by_its_cause(tmp_path: Path, mode: str, failing: int) -> None:
    model = make_tiny_model(tmp_path / "model")
    config = load_config(
        {"model": str(model), "comm": {"timeout_s": 120},
         "kv_cache": {"tokens_per_rank": 64, "block_size": 16}}
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        workers = []
        for rank in range(2):
            place = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_CP_LAUNCHER": "ds-cp",
            }  # fmt: skip
            job = detect({name: str(value) for name, value in place.items()}, timeout_s=60)
            workers.append(stack.enter_context(worker_child(config, job)))
        channels = [worker.channel for worker in workers]
        for channel in channels:
            assert isinstance(received(channel, START_S), Ready)
        for plan in (Idle(), one_token(1, 40, mode, failing)):
            channels[0].send_plan(plan, 0)
            assert isinstance(received(channels[0], START_S), Result)
        channels[0].send_plan(one_token(2, NOT_A_TOKEN, mode, failing), 0)
        began = time.monotonic()
        host = job.host
        for rank, (process, channel, _) in enumerate(workers):
            failed = received(channel, AT_ONCE_S)
            assert isinstance(failed, Failed) and failed.exit_code == 1
            assert failed.message.startswith(f"rank {failing} on {host}: IndexError: "), rank
            assert process.wait(AT_ONCE_S) == 1
        assert time.monotonic() - began < AT_ONCE_S


def test_a_worker_that_is_killed_while_it_loads_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = make_tiny_model(tmp_path / "model"), tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_CP_LAUNCHER": "ds-cp",
    }  # fmt: skip
    job = detect({name: str(value) for name, value in place.items()}, timeout_s=60)
    limit = time.monotonic() + START_S
    with worker_child(load_config({"model": str(model)}), job) as (process, _, _):
        while not list(folder.rglob("config.json")):
            assert process.poll() is None and time.monotonic() < limit
            process.send_signal(signal.SIGCONT)
            time.sleep(0.002)
            process.send_signal(signal.SIGSTOP)
        process.kill()
        process.wait()
        assert list(folder.rglob("config.json"))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGBUS, "SIGBUS (a file of the weights was cut short?)"),
     (signal.SIGKILL, "SIGKILL (out of memory?)"), (signal.SIGSEGV, "SIGSEGV")],
)  # fmt: skip
def test_the_end_of_a_worker_is_said_by_its_signal(number: signal.Signals, said: str) -> None:
    assert describe_end(-number) == said
