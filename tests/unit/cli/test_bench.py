"""The report of a benchmark, and what the engine's kinds and ``kv`` measure."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import types
import weakref
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.cli import main as cli
from ds_cp.cli.bench import serve
from ds_cp.cli.bench.report import Figure, number, percentile
from ds_cp.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tests.helpers.terminal import variables

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_CP_LAUNCHER", "OMPI_COMM_WORLD_RANK")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: Any) -> None:
    for name in (*LAUNCH, *variables()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "HEAD_START_S", 0.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(1, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: int) -> None:
    wanted = np.percentile(values, percent, method="inverted_cdf")
    assert percentile(sorted(values), percent) == wanted
    row = Figure("x", "ms", values).plain()
    assert row["median"] == pytest.approx(median(values), rel=1e-4, abs=1e-9)
    assert (row["count"], row["min"]) == (len(values), pytest.approx(min(values), rel=1e-4))


def test_numbers() -> None:
    assert [number(x) for x in (None, 0.012342, 12.3456, 123456.7)] == [
        "-", "0.01234", "12.35", "123,457",
    ]  # fmt: skip


# --- latency and throughput, over an engine that is replaced


class Engine:
    """Answers of given times: a token every 10 ms, the first after 100 ms."""

    def __init__(self, driver: bool = True) -> None:
        self.is_driver = driver
        self.rounds: list[tuple[list[list[int]], Any]] = []
        self.closed = False
        self.facts = types.SimpleNamespace(
            vocab_size=50, max_model_len=64, hosts=("a", "a"), device="cpu", dtype="fp32",
            kernel="native", threads=1,
        )  # fmt: skip

    def summary(self) -> list[str]:
        return ["1 host"]

    def generate(self, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
        print("noise of a library")
        self.rounds.append((prompts, params))
        new = params.max_tokens
        metrics = RequestMetrics(1000.0, 1000.0, 1000.1, 1000.1 + 0.01 * (new - 1))
        answer = CompletionOutput(0, "", (7,) * new, "length")
        return [
            RequestOutput(str(i), None, tuple(p), (answer,), True, metrics)
            for i, p in enumerate(prompts)
        ]

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: Any) -> Engine:
    engine = Engine()
    module = types.ModuleType("ds_cp.engine.llm")
    module.init_inference = lambda *_, **__: engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ds_cp.engine.llm", module)
    return engine


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "config.json").write_text(json.dumps({"model": str(tmp_path / "model")}))
    return str(tmp_path / "config.json")


def test_latency(engine: Engine, config: str, capfd: Any) -> None:
    argv = "--batch 3 --input-len 8 --output-len 5 --warmup 2 --repeats 4".split()
    assert cli.main(["bench", "latency", "--config", config, *argv, "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and "noise of a library" in err and "1 host" in err
    rows = {row["name"]: row for row in found["figures"]}
    for name, value in (("TTFT", 100.0), ("TPOT", 10.0), ("whole", 140.0)):
        row = rows[name]
        assert (row["count"], row["unit"]) == (12, "ms")
        assert row["min"] == pytest.approx(value, rel=1e-3) == row["median"]
    assert found["settings"] == {"batch": 3, "input_len": 8, "output_len": 5, "warmup": 2,
                                 "repeats": 4}  # fmt: skip
    assert found["about"]["ranks"] == 1 and engine.closed
    assert len(engine.rounds) == 6
    prompts = [tuple(p) for ps, _ in engine.rounds for p in ps]
    assert len(set(prompts)) == 18  # no round finds another's prefix
    assert all(len(p) == 8 and all(0 <= t < 50 for t in p) for p in prompts)
    assert all(p.ignore_eos and p.temperature == 0 for _, p in engine.rounds)


def test_throughput(engine: Engine, config: str, capfd: Any) -> None:
    argv = "--requests 8 --input-len 20 --output-len 4 --warmup 0 --repeats 3".split()
    assert cli.main(["bench", "throughput", "--config", config, *argv]) == 0
    out, _ = capfd.readouterr()
    assert "tokens a second" in out and "requests 8, input_len 20" in out and "dtype fp32" in out
    assert cli.main(["bench", "throughput", "--config", config, *argv, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)["figures"]}
    assert rows["tokens a second"]["count"] == 3
    both = rows["prompt and answer tokens a second"]["median"] / rows["tokens a second"]["median"]
    lengths = [len(p) for p in engine.rounds[0][0]]
    assert both == pytest.approx((sum(lengths) + 32) / 32, rel=1e-3)
    assert (min(lengths), max(lengths)) == (10, 30) and sum(lengths) / 8 == pytest.approx(20, abs=1)


def test_ranks_other_than_0_take_part_and_print_nothing(
    engine: Engine, config: str, capfd: Any
) -> None:
    engine.is_driver = False
    argv = ["bench", "latency", "--config", config, "--warmup", "1", "--repeats", "2"]
    assert cli.main(argv) == 0
    assert capfd.readouterr().out == "" and len(engine.rounds) == 3
    assert all(prompts == [] for prompts, _ in engine.rounds)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("latency", "--config FILE"), ("latency --batch 0", "--batch is 0"),
        ("latency --config CONFIG --output-len 60", "are more than the 64 of this model"),
        ("throughput --config CONFIG --repeats 0", "--repeats is 0"),
        ("throughput --config CONFIG --input-len 50", "prompts of up to 75 tokens"),
        ("latency --config CONFIG --warmup -1", "--warmup is -1"),
        ("kv --blocks 0", "--blocks is 0"), ("kv --dtype int8", "--dtype is 'int8'"),
        ("kv --blocks 1048576 --block-size 128", "above 67108864 tokens"),
        ("kv --ranks 0", "--ranks is 0"), ("kv --head-dim 5000", "--head-dim is 5000"),
    ],
)  # fmt: skip
def test_wrong_flags(engine: Engine, config: str, capfd: Any, argv: str, part: str) -> None:
    words = [config if word == "CONFIG" else word for word in argv.split()]
    assert cli.main(["bench", *words]) == 2
    out, err = capfd.readouterr()
    assert out == "" and part in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("ds_cp: error: ")


# --- serve


class Body(dict[str, Any]):
    """One that can be watched."""


@pytest.mark.parametrize("loop", ["closed", "open"])
@pytest.mark.parametrize("words", [3, serve.THREAD_WORDS + 1])
def test_bodies_are_made_as_they_are_sent(loop: str, words: int, monkeypatch: Any) -> None:
    """So many as are in flight are in memory, whatever the number of requests; and the same ones
    whatever the loop."""
    prompts: list[str] = []
    alive = peak = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    make = serve._Bodies._make

    def watched(self: Any, number: int) -> Body:
        nonlocal alive, peak
        body = Body(make(self, number))
        weakref.finalize(body, gone)
        alive += 1
        peak = max(peak, alive)
        return body

    async def one(server: Any, client: Any, body: Body, outcome: Any) -> None:
        prompts.append(body["prompt"])
        for _ in range(5):
            await asyncio.sleep(0)

    monkeypatch.setattr(serve._Bodies, "_make", watched)
    monkeypatch.setattr(serve, "_one", one)
    nothing: Any = None
    count, at_once, rate = 60, 4, 1e5 if loop == "open" else None
    bodies = serve._Bodies("m", serve.Load(count, words, 1, at_once, rate, 7, True, 0))
    if rate is None:
        asyncio.run(serve._closed(nothing, nothing, bodies, count, at_once))
    else:
        draw = random.Random(7)
        found = asyncio.run(serve._open(nothing, nothing, bodies, count, rate, draw, at_once))
        assert len(found.late) == count
    assert peak <= 2 * at_once and alive == 0  # a thread may still hold the last that it made
    again = serve._Bodies("m", serve.Load(count, words, 1, 1, None, 7, True, 0))
    assert sorted(prompts) == sorted(make(again, n)["prompt"] for n in range(1, count + 1))
    assert all(len(prompt.split()) == words for prompt in prompts)


# --- for real


def bench(*argv: str, timeout: float = 240) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DS_CP_")}
    done = subprocess.run(
        [sys.executable, "-m", "ds_cp.cli", "bench", *argv, "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**kept, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for row in found["figures"]:
        assert 0 < row["min"] <= row["median"] <= row["max"], row
    return found


def test_kv_over_two_ranks() -> None:
    argv = "--ranks 2 --blocks 256 --block-size 16 --layers 2 --repeats 3 --dtype fp32".split()
    found = bench("kv", *argv)
    rows = {row["name"]: row for row in found["figures"]}
    assert set(rows) == {
        "allocate, one block at a time", "free, sequence by sequence",
        "allocate and free, whole prompts", "name a prefix", "find a prefix", "copy within a rank",
        "move to the next rank", "copy to host memory", "copy back from host memory",
    }  # fmt: skip
    assert all(row["count"] == 3 for row in rows.values())
    about = found["about"]
    assert about["ranks"] == 2 and about["bytes_of_a_block"] == 2 * 2 * 16 * 2 * 64 * 4
