"""The plan's wire form: what goes in comes out, and nothing else decodes as a plan."""

from __future__ import annotations

import json
import pickle

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.plan import (
    Begin,
    Chunk,
    Decodes,
    Fork,
    Idle,
    Plan,
    Sampling,
    StepPlan,
    Stop,
    Transfer,
    decode_plan,
    encode_plan,
)

numbers = st.integers(0, 2**31 - 1)
tokens = st.lists(numbers, max_size=5).map(tuple)
homes = st.tuples(st.integers(0, 1023), numbers)
runs = st.lists(st.tuples(numbers, numbers), max_size=3).map(tuple)
finite = st.floats(allow_nan=False, allow_infinity=False)
modes = st.sampled_from(["local", "ring", "tree"])
passes = st.sampled_from(["kv", "q"])


def few(what: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(what, max_size=3).map(tuple)


samplings = st.builds(
    Sampling,
    temperature=finite,
    top_p=finite,
    top_k=st.integers(-1, 2**31 - 1),
    min_p=finite,
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.integers(-1, 20),
    prompt_logprobs=st.integers(-1, 20),
    logit_bias=few(st.tuples(numbers, finite)),
    min_tokens=numbers,
    early_banned=tokens,
    presence_penalty=finite,
    frequency_penalty=finite,
    repetition_penalty=finite,
    grammar=st.text(max_size=5),
    ends=tokens,
)
# Of a plan: to draw all fields of each would take most of the time.
short = st.builds(Sampling, temperature=finite, early_banned=tokens)
plans = st.builds(
    StepPlan,
    step=numbers,
    ended=tokens,
    seen=few(st.tuples(numbers, numbers, numbers)),
    transfers=few(st.builds(Transfer, tokens, numbers, homes, homes)),
    begins=few(st.builds(Begin, numbers, tokens, numbers, few(homes), numbers, short)),
    grown=few(st.tuples(numbers, homes)),
    chunks=few(
        st.builds(
            Chunk, numbers, modes, passes, few(st.tuples(numbers, runs)), few(homes), st.booleans()
        )
    ),
    decodes=few(st.builds(Decodes, modes, passes, tokens)),
    forks=few(st.builds(Fork, numbers, numbers, short)),
    vocabulary=st.none() | st.builds(Vocabulary, st.binary(max_size=8), st.binary(), tokens),
)


anything = st.one_of(plans, st.just(Idle()), st.just(Stop()))


@given(samplings)
def test_roundtrip_of_a_sampling(how: Sampling) -> None:
    plan = StepPlan(1, begins=(Begin(1, (2,), 1, (), 0, how),), forks=(Fork(1, 3, how),))
    assert decode_plan(encode_plan(plan)) == plan


@given(anything)
def test_roundtrip(plan: Plan) -> None:
    back = decode_plan(encode_plan(plan))
    assert back == plan
    assert hash(back) == hash(plan), "tuples all the way down: a plan is frozen"


@given(st.binary(max_size=200))
@example(b"\x91\xa1\x80")  # a tag that is not UTF-8
def test_garbage_is_refused(payload: bytes) -> None:
    """Bytes that decode must spell a plan back; nearly all do not decode."""
    try:
        plan = decode_plan(payload)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return
    assert decode_plan(encode_plan(plan)) == plan


@given(anything, st.data())
def test_truncated_is_refused(plan: Plan, data: st.DataObject) -> None:
    payload = encode_plan(plan)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(msgspec.DecodeError):
        decode_plan(payload[:cut])
    with pytest.raises(msgspec.DecodeError):
        decode_plan(payload + b"\x00")


def test_what_is_left_out_is_empty() -> None:
    """So that a plan of an older sender is short, and an idle plan is its name."""
    assert decode_plan(msgspec.msgpack.encode(["idle"])) == Idle()
    assert decode_plan(msgspec.msgpack.encode(["stop"])) == Stop()
    how = [0.5]
    begin = [7, [1, 2], 2, [], 0, how]
    plan = decode_plan(msgspec.msgpack.encode(["run", 1, [], [], [], [begin]]))
    assert isinstance(plan, StepPlan)
    assert plan.begins[0].sampling == Sampling(temperature=0.5)


HOW: list[object] = []
WRONG_PARTS = {
    "ended": ["7"],
    "seen": [[1, 2]],
    "transfers": [[[1], 0, [0, 1], [0]]],
    "begins": [[1, [2.5], 1, [], 0, HOW]],
    "grown": [[1, 5]],
    "chunks": [[1, "ring", "kv", [[0, [[0]]]], [], False]],
    "decodes": [["tree", "kv", [None]]],
    "forks": [[1, 2, ["hot"]]],
    "vocabulary": [b"ab", "no bytes"],
}


@pytest.mark.parametrize("part", list(WRONG_PARTS))
def test_wrong_types_in_a_part_are_refused(part: str) -> None:
    names = StepPlan.__struct_fields__[1:]
    assert set(names) == set(WRONG_PARTS)
    absent = {"vocabulary": None}
    value = ["run", 1, *(WRONG_PARTS[n] if n == part else absent.get(n, []) for n in names)]
    with pytest.raises(msgspec.ValidationError):
        decode_plan(msgspec.msgpack.encode(value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        ["run", "1"],
        [1, 2],
        [1],
        {"step": 1, "type": "run"},
        ["run", 1.5],
        ["run"],
        ["walk", 1],
        ["outcome", 1],
    ],  # fmt: skip
)
def test_wrong_types_are_refused(value: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_plan(msgspec.msgpack.encode(value))


def test_other_formats_are_refused() -> None:
    for payload in (b"", json.dumps(["run", 1, []]).encode(), pickle.dumps(["run", 1, ()])):
        with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
            decode_plan(payload)


def test_a_step_of_many_decodes_is_a_few_bytes_each() -> None:
    plan = StepPlan(9, decodes=(Decodes("local", "kv", tuple(range(1000, 1256))),))
    assert len(encode_plan(plan)) < 256 * 3 + 64


@pytest.mark.parametrize(
    ("how", "looks_back"),
    [
        ({}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"grammar": "start: /a/"}, True),
        ({"min_tokens": 3, "logit_bias": ((1, 2.0),)}, False),
    ],
)
def test_what_looks_back(how: dict, looks_back: bool) -> None:
    assert Sampling(**how).looks_back == looks_back
