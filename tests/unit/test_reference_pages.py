"""Pages of docs/ that are written from the code are current; what the dashboard asks for is
there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.reference.__main__ import PAGES
from benchmarks.reference.metrics import sample_exposition

DOCS = Path(__file__).resolve().parents[2] / "docs"
DASHBOARD = DOCS / "grafana" / "ds_cp.json"
NAME = re.compile(r"ds_cp:\w+")
SELECTOR = re.compile(r"(ds_cp:\w+)\{([^}]*)\}")
BY = re.compile(r"\bby \(([^)]*)\)")
MATCH = re.compile(r'(\w+)(=~|=)"([^"]*)"')


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_gives(name: str) -> None:
    text = (DOCS / name).read_text("utf-8")
    assert text == PAGES[name](), "run: python -m benchmarks.reference"
    cells = 0  # of the rows of the table at hand
    for line in text.splitlines():
        count = len(re.split(r"(?<!\\)\|", line))
        cells = (cells or count) if line.startswith("|") else 0
        assert count == cells or not line.startswith("|"), line


def samples(text: str) -> dict[str, list[dict[str, str]]]:
    """Sample name -> labels of its samples."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def expression_problems(expression: str, exposed: dict[str, list[dict[str, str]]]) -> list[str]:
    """Names, labels and label values of an expression that /metrics does not have."""
    problems = [f"no metric {name}" for name in NAME.findall(expression) if name not in exposed]
    if problems:
        return problems
    labels = {name: {key for one in exposed[name] for key in one} for name in exposed}
    used = SELECTOR.findall(expression)
    if len(used) != len(NAME.findall(expression)):
        problems.append("a metric without a selector")
    for name, selector in used:
        for key, sign, value in MATCH.findall(selector):
            if key not in labels[name]:
                problems.append(f"{name} has no label {key}")
            elif sign == "=" and all(one.get(key) != value for one in exposed[name]):
                problems.append(f"{name} has no {key} {value}")
        for by in BY.findall(expression):
            problems += [
                f"{name} has no label {key.strip()}"
                for key in by.split(",") if key.strip() not in labels[name]
            ]  # fmt: skip
        counts = name.endswith(("_total", "_bucket"))
        if counts != bool(re.search(rf"rate\({re.escape(name)}\b", expression)):
            problems.append(f"{name}: rate() is for what only grows")
    return problems


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return found


def expressions() -> list[tuple[str, str, str]]:
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    ]


def test_every_panel_asks_for_what_metrics_has() -> None:
    exposed = samples(sample_exposition())
    found = expressions()
    assert len(found) > 40
    problems = {
        f"{title}: {expr}": wrong
        for title, expr, _ in found
        if (wrong := expression_problems(expr, exposed))
    }
    assert problems == {}
    for _, expr, legend in found:
        by = {key.strip() for names in BY.findall(expr) for key in names.split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= by, legend
    [variable] = [v for v in dashboard()["templating"]["list"] if v["name"] == "model_name"]
    assert NAME.search(variable["query"]["query"])[0] in exposed  # type: ignore[index]


def test_every_metric_of_ours_is_on_a_panel() -> None:
    asked = {name for _, expr, _ in expressions() for name in NAME.findall(expr)}
    families = {
        family.name: family.type
        for family in text_string_to_metric_families(sample_exposition())
        if not family.name.endswith("_created")
    }
    left_out = {"ds_cp:comm_exchanges", "ds_cp:ignored_fields", "ds_cp:rank_steps",
                "ds_cp:request_inference_time_seconds"}  # fmt: skip
    ends = {"counter": "_total", "histogram": "_bucket"}
    missing = {
        name
        for name, kind in families.items()
        if name not in left_out and name + ends.get(kind, "") not in asked
    }
    assert missing == set()


def test_panels_have_their_places() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)) and all(x < 24 for x, _ in cells)
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ('rate(ds_cp:nothing_total{model_name=~"x"}[5m])', "no metric ds_cp:nothing_total"),
        ('sum by (rank) (rate(ds_cp:engine_steps_total{model_name=~"x"}[5m]))', "no label rank"),
        ('rate(ds_cp:attention_bytes_total{source="guessed"}[5m])', "no source guessed"),
        ('sum(ds_cp:engine_steps_total{model_name=~"x"})', "only grows"),
        ('rate(ds_cp:num_requests_running{model_name=~"x"}[5m])', "only grows"),
    ],
)
def test_a_wrong_expression_is_found(expression: str, says: str) -> None:
    assert any(says in one for one in expression_problems(expression, samples(sample_exposition())))
