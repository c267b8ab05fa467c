"""The cost model beside published figures: errors stay what they are said to be."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prediction, published
from ds_cp.sizing.device import FOLDER


def own(ranks: int, modes: list[str]) -> dict[str, Any]:
    """What ``--measure`` writes."""
    device = json.loads((FOLDER / "cpu.json").read_text())
    runs = [{"mode": m, "tokens": 1000, "ttft_s": 1.0, "tpot_s": 0.02} for m in modes]
    return {
        "ranks": ranks, "threads_per_rank": 1, "device": device, "runs": runs, "load": 1.0,
        "machine": "m",
    }  # fmt: skip


def test_figures_are_predicted_as_well_as_the_table_says() -> None:
    """Mean and largest error of what nothing was fitted to; the numbers are those of
    benchmarks/results/prediction.md, rounded up."""
    limits = {"TTFT, ": (0.035, 0.07), "TTIT": (0.07, 0.12), "new, CP4": (0.06, 0.18)}
    for word, (mean, largest) in limits.items():
        errors = [
            abs(row.calibrated / row.published - 1)
            for row in published.rows()
            if word in row.what and not row.fit and ("new" in row.what) == ("new" in word)
        ]
        assert len(errors) >= 7
        assert statistics.fmean(errors) < mean and max(errors) < largest


def test_of_two_ways_to_pass_the_faster_one_is_picked_or_nearly() -> None:
    rows = published.choices()
    assert len(rows) == 14
    for name in ("calibrated", "shipped"):
        assert sum(row[name] == row["published"] for row in rows) >= 12
        assert max(row[f"{name}_regret"] for row in rows) < 0.02


def test_every_figure_is_there_and_fits_are_marked() -> None:
    rows = published.rows()
    tables = [row.table for row in rows]
    assert [tables.count(t) for t in ("4", "6", "7", "8", "text")] == [28, 12, 3, 3, 3]
    assert sum(row.fit for row in rows) == 5
    for row in rows:
        if row.fit and row.table != "8":
            assert row.calibrated == pytest.approx(row.published, rel=1e-3), "it was fitted"


def test_scaling_is_of_the_right_kind() -> None:
    """More hosts are faster to the first token and slower for each further one, as published."""
    prefill = [r for r in published.rows() if r.what.startswith("TTFT, 128K tokens")]
    assert [r.what[-3:] for r in prefill[:2]] == ["CP1", "CP2"]
    for one, two in zip(prefill, prefill[1:], strict=False):
        assert two.published < one.published and two.calibrated < one.calibrated
        assert two.shipped < one.shipped
    decode = [r for r in published.rows() if r.what.startswith("TTIT, 128K") and r.table == "7"]
    assert decode[0].calibrated < decode[1].calibrated


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(prediction, "RESULTS", tmp_path)
    monkeypatch.setattr(prediction, "MODEL", str(small(tmp_path)))
    for ranks, modes in ((1, ["local"]), (2, ["kv", "q", "tree"])):
        file = tmp_path / f"prediction_runs_{ranks}_ranks.json"
        file.write_text(json.dumps(own(ranks, modes)))
    prediction.main(["--write"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == json.loads((tmp_path / "prediction.json").read_text())
    assert len(said["own"]) == 8 and {r["what"] for r in said["own"]} == {"TTFT", "TPOT"}
    assert all(r["error"] == r["predicted_s"] / r["measured_s"] - 1 for r in said["own"])
    groups = {row["group"] for row in said["summary"]}
    assert len(groups) == 6 and "own runs, TPOT" in groups
    text = (tmp_path / "prediction.md").read_text()
    assert text.count("(fit)") == 5 + 1
    for row in published.rows():
        assert f"| {row.table} | {row.what} |" in text
    assert "| 2 | tree | 1000 | TPOT |" in text and str(tmp_path) not in text


def small(folder: Path) -> Path:
    """SmolLM2's config.json."""
    config = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
