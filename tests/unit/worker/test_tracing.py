"""A worker that is traced does all of a step itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_cp.trace.recorder import RECORD, Kind, records_of
from ds_cp.worker.tracing import trace_steps
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
