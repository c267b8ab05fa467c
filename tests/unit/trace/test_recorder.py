"""The buffer of spans: whole steps, bounded, nothing outside of steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ds_cp.trace.recorder import (
    MAX_NAMES,
    OTHER,
    RECORD,
    Kind,
    Record,
    Recorder,
    common_end,
    end_of,
    records_of,
)


def recorded(recorder: Recorder) -> list[Record]:
    _, data = recorder.recording()
    return list(records_of(data, 0, len(data) // RECORD.size))


def test_a_step_and_what_is_in_it() -> None:
    recorder = Recorder(100)
    recorder.add(Kind.SUM, "plan", 1)  # outside: not kept
    with recorder.step(7):
        with recorder.span(Kind.LAYER, "attention", 3), recorder.in_mode("ring"):
            number = recorder.next_exchange()
            recorder.add(Kind.POST, "ring_pass_kv to 1 from 2", 5, 640, number, end=9)
        recorder.add(Kind.MODEL, "model", 2, end=12)
    recorder.add(Kind.SUM, "plan", 1)
    head, _ = recorder.recording()
    post, mode, layer, model, step = recorded(recorder)
    assert (post.begin, post.end, post.value, post.number) == (5, 9, 640, 1)
    assert head.names[post.name] == "ring_pass_kv to 1 from 2" and head.names[post.mode] == "ring"
    assert (mode.kind, head.names[mode.name], head.names[mode.mode]) == (Kind.MODE, "ring", "ring")
    assert (layer.kind, layer.number, head.names[layer.mode]) == (Kind.LAYER, 3, "")
    assert (model.begin, model.end, model.kind) == (2, 12, Kind.MODEL)
    assert (step.kind, step.number) == (Kind.STEP, 7)
    assert layer.begin <= mode.begin <= mode.end <= layer.end <= step.end
    assert head.steps == ((7, 0),) and head.left_out == 0


@given(st.lists(st.integers(0, 12), max_size=20), st.integers(1, 40))
def test_whole_steps_up_to_the_limit(sizes: list[int], limit: int) -> None:
    """Kept is the longest beginning whose spans, and one for each step, are within the limit."""
    recorder = Recorder(limit)
    for number, size in enumerate(sizes):
        with recorder.step(number):
            for _ in range(size):
                recorder.add(Kind.ATTEND, "attend", 0)
    kept, room = [], limit
    for number, size in enumerate(sizes):
        if size + 1 > room:
            break
        room -= size + 1
        kept.append(number)
    head, data = recorder.recording()
    assert [number for number, _ in head.steps] == kept
    assert head.left_out == len(sizes) - len(kept)
    assert len(data) == (limit - room) * RECORD.size
    for cut in range(-1, len(sizes)):
        steps = {r.number for r in records_of(data, 0, end_of(head, cut, limit - room))
                 if r.kind == Kind.STEP}  # fmt: skip
        assert steps == {number for number in kept if number <= cut}


def test_a_step_that_fails_is_not_kept() -> None:
    recorder = Recorder(100)
    try:
        with recorder.step(1):
            raise ValueError
    except ValueError:
        pass
    head, data = recorder.recording()
    assert (head.steps, head.left_out, data) == ((), 1, b"")


def test_ranks_that_kept_different_steps_have_a_common_end() -> None:
    recorders = [Recorder(limit) for limit in (10, 4, 7)]
    for recorder in recorders:
        for number in range(10, 20):
            with recorder.step(number):
                recorder.add(Kind.ATTEND, "attend", 0)
    heads = [recorder.recording()[0] for recorder in recorders]
    assert [head.steps[-1][0] for head in heads] == [14, 11, 12]
    assert common_end(heads) == 11
    assert common_end([Recorder(5).recording()[0], *heads]) == -1


def test_names_are_bounded() -> None:
    recorder = Recorder(10 * MAX_NAMES)
    with recorder.step(1):
        for number in range(2 * MAX_NAMES):
            recorder.add(Kind.ATTEND, str(number), 0)
    head, _ = recorder.recording()
    assert len(head.names) == MAX_NAMES
    assert head.names[recorded(recorder)[-2].name] == OTHER
