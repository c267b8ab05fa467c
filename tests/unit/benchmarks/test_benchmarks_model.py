"""The benchmarks that need the model still run, on the smallest sizes; their figures are not looked
at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import latency, overhead


def test_overhead(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(smollm2.parent.parent)
    overhead.main("--batches 2 --context 12 --rounds 1 --steps 2 --threads 1".split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["batches"]
    assert row["answers_with_equal_tokens"] == 2  # the engine's and transformers' greedy tokens
    parts = row["parts_ms"]
    assert parts["lead"] > parts["  forward"] > parts["    attend"] > parts["      kernel"] > 0


def test_spread() -> None:
    found = latency.spread([float(n) for n in range(101, 0, -1)])
    assert found == {"median": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0, "count": 101}
