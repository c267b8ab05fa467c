"""A trace of real ranks: spans nest, all ranks are in it, bytes are those of the ledger; and what
the engine counts of each rank."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from ds_cp.comm.wire import World
from ds_cp.engine.core import EngineCore
from ds_cp.engine.wire_model import WireModel
from ds_cp.errors import OutputError, RankFailedError
from ds_cp.plan import ATTENTION_SCHEMES
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.build import build_scheduler
from ds_cp.trace.chrome import TraceFile
from ds_cp.trace.summary import read_trace, summarize
from ds_cp.trace.writing import Writing
from ds_cp.worker.step_context import StepContext
from ds_cp.worker.tracing import trace_steps
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

LAYERS = 2
TOKENS = 5
Sent = dict[str, int]  # bytes by scheme


def config(mode: str, size: int, **more: Any) -> dict[str, Any]:
    """``size`` ranks, all of which are needed for a request."""
    return {
        "kv_cache": {"tokens_per_rank": 96 // size, "block_size": 16},
        "context_parallel": {"mode": mode, "local_threshold": 0 if mode == "auto" else "auto"},
        **more,
    }


def traced(world: World, mode: str, file: str) -> tuple[list[int], Sent, dict[str, Any]]:
    """The tokens of an answer, what this rank's ledger counted meanwhile, and rank 0's counters."""
    engine = engine_on(world, tiny_llama(), config(mode, world.size, trace={"file": file}))
    if world.rank == 0:
        scheduler = build_scheduler(engine._config, engine.facts, paced=False)
        engine._core = EngineCore(scheduler, None, WireModel.of(engine.facts))
    before = {scheme: entry.bytes for scheme, entry in world.ledger.schemes().items()}
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    outputs = engine.generate([[i % 100 for i in range(75)]], params)
    sent = {
        scheme: entry.bytes - before.get(scheme, 0)
        for scheme, entry in world.ledger.schemes().items()
    }
    stats = dataclasses.asdict(engine._driver.stats()) if world.rank == 0 else {}
    engine.shutdown()
    tokens = list(outputs[0].outputs[0].token_ids) if outputs else []
    return tokens, {scheme: count for scheme, count in sent.items() if count}, stats


@pytest.mark.parametrize(
    ("size", "mode", "hosts"), [(3, "auto", None), (2, "tree", ["a", "b"])], ids=["auto", "hosts"]
)
def test_a_trace_of_prefill_and_decode(
    size: int, mode: str, hosts: list[str] | None, tmp_path: Path
) -> None:
    file = str(tmp_path / "trace.json")
    ranks = run_ranks(traced, size, mode, file, hosts=hosts)
    found = read_trace(file)
    events = found["traceEvents"]
    about = found["otherData"]
    assert (about["ranks"], about["left_out_steps"], about["device"]) == (size, 0, "cpu")
    assert about["hosts"] == (hosts or ["localhost"] * size)
    assert about["clock_error_us"] == 0, "the processes have one clock"
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == set(range(1, size + 1)), "rank + 1"
    check_nesting(spans)
    check_exchanges(events)
    modes = {"auto": {"ring pass-KV", "tree"}, "tree": {"tree"}}[mode]
    for rank in range(size):
        mine = [event for event in spans if event["pid"] == rank + 1]
        assert {e["args"]["mode"] for e in mine if e["cat"] == "mode"} == modes
        assert {e["args"]["layer"] for e in mine if e["cat"] == "layer"} == set(range(LAYERS))
        assert len([e for e in mine if e["cat"] == "step"]) == about["steps"] == TOKENS
        assert any(e["cat"] == "attend" for e in mine) and any(e["cat"] == "model" for e in mine)
    check_steps_overlap(spans, size)

    # Every byte of a step is in it: of what is not, plans come before their step.
    summary = summarize(found)
    for rank, (_, sent, _) in enumerate(ranks):
        want = {scheme: count for scheme, count in sent.items() if scheme not in ("plan", "trace")}
        got = {scheme: count for scheme, count in summary.sent[rank].items() if count}
        assert got == want, rank
    for name in modes:
        entry = summary.modes[name]
        assert entry.attention > 0 and entry.under_way >= entry.waiting > 0
        assert 0 <= entry.overlapped <= entry.under_way

    # What the engine counts of all ranks is the same, and is what the formulas say.
    stats = ranks[0][2]
    for scheme in ATTENTION_SCHEMES:
        counted = sum(sent.get(scheme, 0) for _, sent, _ in ranks)
        assert stats["attention_bytes"][scheme] == counted == stats["predicted_bytes"][scheme]
    assert stats["rank_steps"] == (TOKENS,) * size
    for seconds, waited in zip(stats["rank_seconds"], stats["rank_waits"], strict=True):
        assert 0 < waited < seconds
    assert stats["skew"] >= 1 and stats["skew_seconds"] > 0
    assert ranks[0][0] == run_ranks(untraced, size, mode)[0]


def untraced(world: World, mode: str) -> list[int]:
    engine = engine_on(world, tiny_llama(), config(mode, world.size))
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    outputs = engine.generate([[i % 100 for i in range(75)]], params)
    return list(outputs[0].outputs[0].token_ids) if outputs else []


def check_nesting(spans: list[dict[str, Any]]) -> None:
    """Any two spans of a rank are apart, or one is within the other; and all are in a step."""
    for rank in {event["pid"] for event in spans}:
        mine = sorted(
            (round(e["ts"] * 1000), -round(e["dur"] * 1000), e["cat"])
            for e in spans if e["pid"] == rank
        )  # fmt: skip
        ends: list[int] = []  # of the spans that are open
        for begin, minus, kind in mine:
            end = begin - minus
            while ends and ends[-1] <= begin and not (minus == 0 and ends[-1] == begin):
                ends.pop()
            assert not ends or end <= ends[-1], (rank, kind, begin, end, ends)
            assert ends or kind == "step", (rank, kind)
            ends.append(end)


def check_exchanges(events: list[dict[str, Any]]) -> None:
    """Each one that was posted ends, later, and its wait is the end of it."""
    ends = {e["id"]: e for e in events if e["ph"] == "e"}
    begins = {e["id"]: e for e in events if e["ph"] == "b"}
    assert begins and set(begins) == set(ends)
    assert all(ends[name]["ts"] >= one["ts"] for name, one in begins.items())


def check_steps_overlap(spans: list[dict[str, Any]], size: int) -> None:
    """All ranks exchange in every step, so by one clock there is a moment at which all are in
    it."""
    steps: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in spans:
        if event["cat"] == "step":
            steps[event["args"]["step"]].append((event["ts"], event["ts"] + event["dur"]))
    for number, times in steps.items():
        assert len(times) == size, number
        assert max(begin for begin, _ in times) < min(end for _, end in times), number


def small(world: World, file: str, gone: list[str]) -> tuple[str, list[str]]:
    """A trace with room for a few steps; then into places that cannot be written."""
    engine = engine_on(world, tiny_llama(), config("tree", world.size))
    worker = engine._worker
    worker.tracing = trace_steps(worker, file, 100)
    engine.generate([[5] * 75], SamplingParams(max_tokens=12, temperature=0.0))
    line = worker.tracing.write()
    problems = []
    for place in gone:
        worker.tracing = trace_steps(worker, place, 1000)
        try:
            problems.append(worker.tracing.write())
        except OutputError as err:
            problems.append(str(err))
    return line, problems


def test_what_found_no_room_is_said(tmp_path: Path) -> None:
    file, full = str(tmp_path / "small.json"), tmp_path / "full.json"
    full.with_name("full.json.part").symlink_to("/dev/full")
    gone = [str(tmp_path / "gone" / "x.json"), str(full)]
    (line, problems), *others = run_ranks(small, 3, file, gone)
    assert others == [("", ["", ""])] * 2
    found = read_trace(file)
    about = found["otherData"]
    steps = {rank: [] for rank in range(3)}  # type: dict[int, list[int]]
    for event in found["traceEvents"]:
        if event["ph"] == "X" and event["cat"] == "step":
            steps[event["pid"] - 1].append(event["args"]["step"])
    assert steps[0] == steps[1] == steps[2] and len(steps[0]) == about["steps"] > 0
    assert about["steps"] + about["left_out_steps"] == 12
    assert f"{about['left_out_steps']} later steps had no room" in line
    spans = sum(event["ph"] == "X" for event in found["traceEvents"])
    assert spans <= 3 * 100 and f"{spans} spans" in line
    for problem, why in zip(problems, ("No such file", "No space left"), strict=True):
        assert f"cannot write the trace to {tmp_path}" in problem and "\n" not in problem
        assert why in problem
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]
    json.dumps(summarize(found).plain())


def hurried(world: World, file: str, left: Path) -> bool:
    """Rank 0 writes for as long as another rank is there; whether all of them left meanwhile, and
    whether who looks sees it work."""
    engine = engine_on(world, tiny_llama(), config("tree", world.size))
    worker = engine._worker
    worker.tracing = trace_steps(worker, file, 1000)
    engine.generate([[5] * 75], SamplingParams(max_tokens=2, temperature=0.0))
    found, whole, seen = True, TraceFile.rank, Writing(file, 60.0)

    def slow(self: TraceFile, *rest: Any) -> int:
        nonlocal found
        end = time.monotonic() + 30
        while len(list(left.iterdir())) < world.size - 1 and time.monotonic() < end:
            time.sleep(0.01)
        found = found and len(list(left.iterdir())) == world.size - 1 and seen.goes_on()
        return whole(self, *rest)

    TraceFile.rank = slow  # type: ignore[method-assign]
    worker.tracing.write()
    if world.rank != 0:
        (left / str(world.rank)).touch()
    return found and not (world.rank == 0 and seen.goes_on())


def test_no_rank_waits_while_the_file_is_written(tmp_path: Path) -> None:
    """That takes seconds a rank; the last of many would be late for the job's time limit."""
    (tmp_path / "left").mkdir()
    file = tmp_path / "trace.json"
    assert run_ranks(hurried, 3, str(file), tmp_path / "left") == [True] * 3
    assert summarize(read_trace(str(file))).ranks == 3


def a_job_that_fails(world: World, file: str) -> str:
    """What is said of the trace of it."""
    engine = engine_on(world, tiny_llama(), config("tree", world.size, trace={"file": file}))
    whole = StepContext.attend

    def attend(self: StepContext, layer: int, *qkv: Any) -> Any:
        if world.rank == 1 and layer == 1:
            raise RuntimeError("out of memory (pretended)")
        return whole(self, layer, *qkv)

    StepContext.attend = attend  # type: ignore[method-assign]
    with pytest.raises(RankFailedError, match="out of memory"):
        engine.generate([[5] * 75], SamplingParams(max_tokens=2, temperature=0.0))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine.shutdown()
    return said.getvalue()


def test_a_job_that_fails_says_that_there_is_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    said = run_ranks(a_job_that_fails, 2, str(file))
    assert said == [f"ds_cp: no trace is written to {file}: the job failed\n", ""]
    assert list(tmp_path.iterdir()) == []
