"""What the measures under attack and the generated requests make of what they see."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attacks, environments
from benchmarks.environments import environment
from benchmarks.fuzz.__main__ import failures, summary
from tests.helpers.attackers import BODY_BYTES, KINDS, WORST, attackers, worst

HELD: dict[str, Any] = {
    "server": "fake",
    "attack": "none",
    "gap_s": 1.0,
    "lost": 0,
    "whole": 20,
    "first_s": 0.1,
    "health_s": 0.01,
    "health_bad": 0,
    "memory_before_mb": 90.0,
    "memory_most_mb": 900.0,
    "memory_after_mb": 190.0,
    "descriptors_before": 27,
    "descriptors_under_attack": 700,
    "descriptors_after": 7,
    "ended": True,
    "held": True,
}


@pytest.mark.parametrize(
    ("changed", "held"),
    [
        ({}, True),
        ({"gap_s": 1.1}, False),
        ({"lost": 1}, False),
        ({"memory_after_mb": 191.0}, False),
        ({"ended": False}, False),
    ],
)
def test_what_must_hold(changed: dict[str, Any], held: bool) -> None:
    row = HELD | changed
    assert attacks.holds(row) is held
    assert ("miss" in attacks.line(row | {"held": held})) is not held


def test_a_front_that_was_killed_has_a_row_of_the_table() -> None:
    row = {"server": "fake", "attack": "idle", "ended": False, "held": False, "error": "killed"}
    lines = attacks.table([HELD, row]).splitlines()
    assert not attacks.holds(row)
    assert {text.count("|") for text in lines} == {len(attacks.HEADS) + 1}


def test_the_worst_bodies_are_as_large_as_the_server_reads() -> None:
    sizes = [len(body) for _, body in (worst(number) for number in range(WORST))]
    assert max(sizes) <= 8 * 2**20 and sorted(sizes)[1] > BODY_BYTES // 2


def test_attackers_attack_until_the_block_ends() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=2000) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with attackers(url, ("idle", "tiny_chunks")) as did:
            listener.accept()[0].close()
    assert set(did) == {"idle", "tiny_chunks"} < set(KINDS)
    assert all(kind["opened"] and kind["cpu_s"] < 2 for kind in did.values()), did


def test_failures_are_read_from_what_schemathesis_prints() -> None:
    output = """
==== ERRORS ====
____ POST /a ____
Runtime Error
    details
==== FAILURES ====
____ POST /b ____
1. Test Case ID: x

- ST105 Undocumented Content-Type

    Received: text/plain
==== SUMMARY ====
- not this
"""
    assert failures(output) == [
        "POST /a",
        "Runtime Error",
        "POST /b",
        "- ST105 Undocumented Content-Type",
        "Received: text/plain",
    ]
    assert failures("==== SUMMARY ====\n- all well") == []


def test_cases_are_counted_by_status_and_content_type() -> None:
    rows = [["GET /a", 200, "application/json", 3], ["GET /a", 500, "", 1]]
    found = summary(
        [
            {"rows": rows, "found": [], "same_process": True},
            {"rows": rows[:1], "found": ["x"], "same_process": False},
        ]
    )
    assert found == {
        "cases": 7,
        "server_errors": 1,
        "failures": 1,
        "same_process": False,
        "statuses": {"200": 6, "500": 1},
        "content_types": {"application/json": 6, "none": 1},
    }
    json.dumps(found)


def test_an_environment_is_made_again_for_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(command: Sequence[str], limit_s: float) -> None:
        assert limit_s == (20.0 if "pip" in command else environments.INSTALL_S)
        if "pip" in command and "broken" in command:
            raise RuntimeError("pip install broken failed")
        if "venv" in command:
            folder = tmp_path / "one" / "bin"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "python").touch()
        ran.append(command[2])

    monkeypatch.setattr(environments, "_run", run)
    python = environment("one", ("a", "b"), tmp_path, 20.0)
    assert python == tmp_path / "one" / "bin" / "python" and ran == ["venv", "pip"]
    environment("one", ("a", "b"), tmp_path, 20.0)
    assert ran == ["venv", "pip"]  # it is there
    with pytest.raises(RuntimeError, match="broken"):
        environment("one", ("broken",), tmp_path, 20.0)
    environment("one", ("a", "b"), tmp_path, 20.0)
    assert ran == ["venv", "pip"] + ["venv"] + ["venv", "pip"]  # the broken one is not taken
