"""The conformance run: every part has a line, none is left running, and a skip says why."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.conformance.parts import Part, SkippedError, made, parts
from benchmarks.conformance.run import Done, exit_code, run_all, run_one, table
from benchmarks.evaluation.__main__ import compared


def python(name: str, code: str, limit_s: float = 60) -> Part:
    return Part(name, [sys.executable, "-c", code], limit_s)


def unable() -> None:
    raise SkippedError("no browser")


def test_parts_end_as_ok_failed_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_all(
        [
            python("good", "print('fine')"),
            python("bad", "print('before'); raise SystemExit('broken')"),
            Part("absent", ["nothing-of-this-name"], 60, unable),
        ],
        600,
        tmp_path,
    )
    assert [(one.result, one.detail) for one in found] == [
        ("ok", ""),
        ("failed", "exit code 1: broken"),
        ("skipped", "no browser"),
    ]
    assert "before" in capsys.readouterr().out  # what a failed part printed is shown
    assert exit_code(found) == 1 and exit_code(found[::2]) == 0
    assert table(found).splitlines()[-1] == "1 passed, 1 failed, 1 skipped"


def test_a_part_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    """An interrupt lets it end what it started in other sessions; then it is killed."""
    note = tmp_path / "children"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(3))\n"
        "time.sleep(600)\n"
    )
    done = run_one(python("hangs", code, 3), 600, tmp_path)
    assert (done.result, done.detail) == ("failed", "did not end within 3 s")
    end = time.monotonic() + 30
    while note.exists() and psutil.pid_exists(int(note.read_text())) and time.monotonic() < end:
        if psutil.Process(int(note.read_text())).status() == psutil.STATUS_ZOMBIE:
            break  # killed; whoever took it over has not looked yet
        time.sleep(0.05)
    assert time.monotonic() < end


def test_no_part_begins_when_the_time_is_used_up(tmp_path: Path) -> None:
    late = run_one(python("late", "raise SystemExit(1)"), -1.0, tmp_path)
    assert late.result == "skipped" and "no time was left" in late.detail
    slow = run_one(python("slow", "import time; time.sleep(600)"), 0.5, tmp_path)
    assert slow.result == "skipped" and "used up" in slow.detail


def test_an_environment_that_cannot_be_made_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("pip failed with 1:\nno such package")

    monkeypatch.setattr("benchmarks.conformance.parts.environment", refuse)
    with pytest.raises(SkippedError, match="environment tool cannot be made: .* no such package"):
        made(("tool", ("tool==1",)))()


def test_the_parts_write_nothing_into_the_repository(tmp_path: Path) -> None:
    for part in parts(tmp_path):
        outs = [
            value for name, value in zip(part.argv, part.argv[1:], strict=False) if name == "--out"
        ]
        assert all(value.startswith(str(tmp_path)) for value in outs)
        assert outs or "--check" in part.argv or part.name == "browser"
    assert sum(part.limit_s for part in parts(tmp_path)) < 40 * 60


def test_the_table_lines_up() -> None:
    lines = table([Done("a", "ok", "", 1.0), Done("longer", "skipped", "why", 100.0)]).splitlines()
    assert lines[0].index("ok") == lines[1].index("skipped") and lines[1].endswith("why")


def test_scores_are_compared_by_number_and_answers_by_text() -> None:
    def backend(score: float, answers: list[object]) -> dict[str, object]:
        samples = [{"id": n, "answers": each} for n, each in enumerate(answers)]
        return {"task": {"metrics": {"acc": score}, "samples": samples}}

    def row(*both: dict[str, object]) -> dict[str, object]:
        (found,) = compared(both[0], both[1], "served")
        return found

    near = row(backend(0.5, [[["-1.5", "True"]]]), backend(0.5, [[["-1.50001", "True"]]]))
    assert near["same"] and near["largest_difference"] == pytest.approx(1e-5)
    assert not row(backend(0.5, ["yes"]), backend(0.5, ["no"]))["same"]
    assert row(backend(0.5, ["yes"]), backend(0.5, ["no"]))["different_answers"] == 1
    assert not row(backend(0.5, ["yes"]), backend(0.50001, ["yes"]))["same"]
