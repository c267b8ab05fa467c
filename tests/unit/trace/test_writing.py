"""Whether a trace is seen to be written."""

from __future__ import annotations

import os
from pathlib import Path

from ds_cp.trace.writing import Writing, part_of


def test_a_writer_is_seen_for_as_long_as_it_gets_on(tmp_path: Path) -> None:
    now, file = 0.0, str(tmp_path / "trace.json")
    part = Path(part_of(file))
    part.write_text("of another job")
    os.utime(part, ns=(1, 1))
    seen = Writing(file, 10.0, lambda: now)
    assert not seen.goes_on()
    part.touch()  # a write, or a sign that one comes
    for seconds, want in ((0, True), (9, True), (2, False)):
        now += seconds
        assert seen.goes_on() == want
    with part.open("a") as out:
        out.write("more")
    assert seen.goes_on()
    part.unlink()
    assert not seen.goes_on()
    part.touch()
    assert seen.goes_on()


def test_without_a_trace_nothing_is_written(tmp_path: Path) -> None:
    assert not Writing(None, 10.0).goes_on()
    assert not Writing(str(tmp_path / "no folder" / "file"), 10.0).goes_on()
