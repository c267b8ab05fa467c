"""A worker that is traced does all of a step itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_cp.attention import LayerSpec
from ds_cp.kv.host_store import FileStore
from ds_cp.kv.pool import KVPool
from ds_cp.trace.chrome import events_of
from ds_cp.trace.recorder import RECORD, Kind, Recorder, records_of
from ds_cp.worker.tracing import TracedStore, trace_steps
from tests.unit.worker.test_decode_graph import Repeated, answers, with_graphs


def test_no_step_is_replayed_while_it_is_traced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = with_graphs(monkeypatch)
    captured = answers(engine)
    replays = sum(graph.replays for graph in Repeated.made)
    assert replays > 10
    tracing = trace_steps(engine._worker, str(tmp_path / "trace.json"), 100_000)
    assert [ids for ids, _ in answers(engine)] == [ids for ids, _ in captured]
    assert sum(graph.replays for graph in Repeated.made) == replays
    head, data = tracing.recorder.recording()
    kinds = [record.kind for record in records_of(data, 0, len(data) // RECORD.size)]
    steps = kinds.count(Kind.STEP)
    assert steps == len(head.steps) > 10
    assert kinds.count(Kind.MODEL) == steps and kinds.count(Kind.LAYER) == 2 * steps


def test_copies_to_the_host_are_spans() -> None:
    pool = KVPool([LayerSpec(2, 1, 8, 0.5)], 4, 2, torch.float32, torch.device("cpu"))
    recorder, nbytes = Recorder(10), pool.block_elements * 4
    store = TracedStore(FileStore(pool, 3), recorder, nbytes)
    pool.put_blocks([1], torch.ones(1, pool.block_elements))
    with recorder.step(1):
        store.save([1, 0], [2, 0])
        store.settle()
        store.load([2], [3], later=True)
        assert store.read([2]).eq(1).all()
    assert pool.get_blocks([3]).eq(1).all() and store.num_slots == 3 and store.num_failed == 0
    store.close()
    head, data = recorder.recording()
    *spans, step = records_of(data, 0, len(data) // RECORD.size)
    assert [(r.kind, head.names[r.name], r.number, r.value) for r in spans] == [
        (Kind.HOST, "to the host", 2, 2 * nbytes),
        (Kind.HOST, "from the host, later", 1, nbytes),
        (Kind.HOST, "from the host, for another rank", 1, nbytes),
    ]
    [event] = events_of(0, head.names, spans[0], lambda ns: ns)
    assert event["args"] == {"blocks": 2, "bytes": 2 * nbytes} and event["name"] == "to the host"
    assert step.kind == Kind.STEP
