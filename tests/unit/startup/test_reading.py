"""What is read at start to know how fast weights are read, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_cp.model.borrowed import Borrowed
from ds_cp.startup import reading
from ds_cp.startup.packing import plan_packing
from ds_cp.startup.reading import PASS_S, Read, reading_rate, weight_reads
from tests.helpers.engines import tiny_llama
from tests.unit.startup.test_packing import needs_library, world

CPU = torch.device("cpu")


class Clock:
    """Instead of ``time``: runs on only while something is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def read(self, seconds: Callable[[], float]) -> Callable[[], object]:
        def run() -> None:
            self.now += seconds()

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(reading, "time", found)
    return found


def test_an_interruption_of_some_reads_does_not_count(clock: Clock) -> None:
    """100 reads of 1000 bytes in 1 us each; every third takes a thousand times as long."""
    calls = iter(range(10**6))
    reads: list[Read] = [
        (1000, clock.read(lambda: 1e-6 if next(calls) % 3 else 1e-3)) for _ in range(5)
    ]
    assert reading_rate(reads, CPU) == pytest.approx(1e9)


def test_what_is_read_is_bounded(clock: Clock) -> None:
    done: list[int] = []
    reads: list[Read] = [(10**6, clock.read(lambda: done.append(1) or 1e-4)) for _ in range(10**4)]
    assert reading_rate(reads, CPU) == pytest.approx(1e10)
    assert clock.now <= 4 * (PASS_S + 2e-4) < 0.05
    slow: list[Read] = [(10**6, clock.read(lambda: 1.0))] * 9
    began = clock.now
    assert reading_rate(slow, CPU) == pytest.approx(1e6)
    assert clock.now - began <= 4.1, "one, four times"
    reads = [(reading.MOST_BYTES // 2, clock.read(lambda: done.append(1) or 0.0))] * 9
    done.clear()
    reading_rate(reads, CPU)
    assert len(done) == 8, "two, four times, where the clock does not run"


def test_each_matrix_is_read_once_and_a_large_one_only_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama()
    sizes = [p.numel() * 4 for p in model.parameters() if p.dim() == 2]
    assert sum(nbytes for nbytes, _ in weight_reads(model)) == sum(sizes)
    monkeypatch.setattr(reading, "LARGE_BYTES", min(sizes))
    assert {nbytes for nbytes, _ in weight_reads(model)} == {min(sizes)}
    monkeypatch.setattr(reading, "LARGE_BYTES", 0)
    assert len(weight_reads(model)) == len(sizes)
    assert reading_rate(weight_reads(model), CPU) > 0


@needs_library
def test_packed_layers_read_what_they_hold() -> None:
    model = tiny_llama()
    before = weight_reads(model)
    with Borrowed(model):
        plan_packing("auto", model, world(), kept=True)()
        after = weight_reads(model)
        assert sorted(n for n, _ in after) == sorted(n for n, _ in before)
        assert reading_rate(after, CPU) > 0


def test_a_model_without_matrices_has_no_rate() -> None:
    none: Any = nn.Sequential(nn.LayerNorm(8))
    assert weight_reads(none) == [] and reading_rate([], CPU) == 0.0
