"""The numbers of a trace, from one whose numbers are known; and files that are none."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.trace.chrome import TraceFile
from ds_cp.trace.recorder import Kind, Record
from ds_cp.trace.summary import (
    TraceError,
    common_length,
    length,
    read_trace,
    summarize,
    table,
    union,
)

NAMES = ("", "other", "ring pass-KV", "ring_pass_kv to 1 from 1", "attend", "merge", "plan",
         "step", "model", "attention")  # fmt: skip
MS = 1_000_000
ABOUT = {"version": "0", "ranks": 2, "hosts": ["a", "b"], "device": "cpu", "steps": 1,
         "left_out_steps": 3, "clock_error_us": 0.0}  # fmt: skip


def span(kind: Kind, name: int, begin: int, end: int, mode: int = 0, **more: int) -> Record:
    return Record(
        begin * MS, end * MS, more.get("value", 0), more.get("number", 0), name, mode, kind
    )


# A step of 100 ms. An exchange is under way from 10 to 70: posted 10 to 15, waited for 60 to 70;
# kernels compute 20 to 50 and, after it, 75 to 80.
STEP = [
    span(Kind.POST, 3, 10, 15, 2, value=640, number=1),
    span(Kind.ATTEND, 4, 20, 50, 2),
    span(Kind.WAIT, 3, 60, 70, 2, number=1),
    span(Kind.ATTEND, 4, 75, 80, 2),
    span(Kind.FOLD, 5, 80, 82, 2),
    span(Kind.MODE, 2, 8, 85, 2),
    span(Kind.LAYER, 9, 5, 90, number=4),
    span(Kind.MODEL, 8, 4, 95),
    span(Kind.SUM, 6, 96, 97, value=40),
    span(Kind.STEP, 7, 0, 100, number=12),
]


def written(ranks: Iterable[tuple[int, Callable[[int], int]]] = ((0, int), (1, int))) -> str:
    out = io.StringIO()
    trace = TraceFile(out, ABOUT)
    for rank, aligned in ranks:
        assert trace.rank(rank, "ab"[rank], NAMES, STEP, aligned) == len(STEP)
    trace.end()
    return out.getvalue()


def test_the_file_is_what_perfetto_reads() -> None:
    found = json.loads(written())
    assert found["displayTimeUnit"] == "ms"
    events = found["traceEvents"]
    assert {e["pid"] for e in events} == {1, 2}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        "rank 0 on a", "rank 1 on b",
    ]  # fmt: skip
    step = next(e for e in events if e["ph"] == "X" and e["cat"] == "step")
    assert (step["name"], step["ts"], step["dur"]) == ("step 12", 0, 100_000)
    post = next(e for e in events if e["ph"] == "X" and e["cat"] == "post")
    assert post["name"] == "post ring_pass_kv" and post["dur"] == 5000
    assert post["args"] == {
        "mode": "ring pass-KV", "scheme": "ring_pass_kv", "exchange": 1, "bytes": 640,
        "peers": "to 1 from 1",
    }  # fmt: skip
    begin, end = [next(e for e in events if e["ph"] == phase and e["pid"] == 2) for phase in "be"]
    assert begin["id"] == end["id"] == "1.1" and (begin["ts"], end["ts"]) == (10_000, 70_000)


def test_the_numbers_of_a_known_trace() -> None:
    found = summarize(json.loads(written()))
    assert found.ranks == 2 and set(found.modes) == {"ring pass-KV"}
    mode = found.modes["ring pass-KV"]
    each = (mode.attention, mode.posting, mode.waiting, mode.folding, mode.under_way)
    assert each == pytest.approx((0.07, 0.01, 0.02, 0.004, 0.12))
    assert mode.overlap == pytest.approx(30 / 60)
    assert (mode.spans, mode.bytes) == (2, 1280)
    assert found.sent == {r: {"ring_pass_kv": 640, "plan": 40} for r in (0, 1)}
    assert (found.step_s, found.model_s) == pytest.approx((0.2, 0.182))
    text = table(found)
    assert text[1] == "3 later steps had no room (trace.max_events)"
    assert text[-1].split() == [
        "ring", "pass-KV", "0.070", "0.010", "0.020", "0.004", "0.120", "50.0", "%", "0.001",
    ]  # fmt: skip
    json.dumps(found.plain(), allow_nan=False)


Spans = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 12)).map(lambda x: (float(x[0]), float(sum(x))))
)


@given(Spans, Spans)
def test_intervals_by_counting(a: Any, b: Any) -> None:
    """Unit by unit of time."""
    ones = [{i for begin, end in some for i in range(int(begin), int(end))} for some in (a, b)]
    one, two = union(a), union(b)
    assert (length(one), length(two)) == (len(ones[0]), len(ones[1]))
    assert common_length(one, two) == len(ones[0] & ones[1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no trace, or was cut short"),
        (b"\xff\xfe", "is no trace"),
        (b"[" * 100_000, "is no trace"),
        (b"[]", "not a trace that ds_cp wrote"),
        (b'{"traceEvents": []}', "not a trace that ds_cp wrote"),
        (b'{"otherData": {"producer": "ds_cp", "format": 99}}', "format 99"),
        (written().encode()[:-5], "cut short"),
    ],
)
def test_files_that_are_no_trace(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(TraceError, match=says) as info:
        read_trace(str(file))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "events", [[1], [{}], [{"ph": "X", "pid": 0}], [{"ph": "b", "pid": 0}], None, 5, {"a": 1}]
)
def test_a_damaged_trace_is_one_line(events: Any) -> None:
    with pytest.raises(TraceError, match="damaged"):
        summarize({"otherData": ABOUT, "traceEvents": events})
    with pytest.raises(TraceError, match="damaged"):
        summarize({"otherData": {}, "traceEvents": []})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(str(tmp_path / "nothing.json"))
