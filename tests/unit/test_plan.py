"""The plan's wire form: what goes in comes out, and nothing else is taken for a plan."""

from __future__ import annotations

import json
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.engine.plan import (
    Item,
    Sampling,
    Shard,
    StepPlan,
    check_item,
    decode_plan,
    encode_plan,
)

numbers = st.integers(0, 2**31 - 1)
runs = st.lists(st.tuples(numbers, numbers), max_size=3).map(tuple)
shards = st.builds(Shard, st.integers(0, 1023), runs, runs, runs, numbers)
finite = st.floats(allow_nan=False, allow_infinity=False)
samplings = st.builds(
    Sampling,
    temperature=finite,
    top_p=finite,
    top_k=st.integers(-1, 2**31 - 1),
    min_p=finite,
    seed=st.integers(-(2**63), 2**63 - 1),
    index=numbers,
    logprobs=st.integers(-1, 20),
    logit_bias=st.lists(st.tuples(numbers, finite), max_size=3).map(tuple),
    banned=st.lists(numbers, max_size=3).map(tuple),
)
items = st.builds(
    Item,
    request=numbers,
    mode=st.sampled_from(["local", "ring", "tree"]),
    ring_pass=st.sampled_from(["kv", "q"]),
    start=numbers,
    tokens=st.lists(numbers, max_size=5).map(tuple),
    shards=st.lists(shards, max_size=3).map(tuple),
    sampling=st.none() | samplings,
)
plans = st.builds(
    StepPlan,
    step=numbers,
    kind=st.sampled_from(["run", "idle", "stop"]),
    items=st.lists(items, max_size=3).map(tuple),
)


@given(plans)
def test_roundtrip(plan: StepPlan) -> None:
    back = decode_plan(encode_plan(plan))
    assert back == plan
    assert hash(back) == hash(plan), "tuples all the way down: a plan is frozen"


@given(st.binary(max_size=200))
def test_garbage_is_refused(payload: bytes) -> None:
    """Bytes that decode must spell a plan back; nearly all do not decode."""
    try:
        plan = decode_plan(payload)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return
    assert decode_plan(encode_plan(plan)) == plan


@given(plans, st.data())
def test_truncated_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    payload = encode_plan(plan)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(msgspec.DecodeError):
        decode_plan(payload[:cut])
    with pytest.raises(msgspec.DecodeError):
        decode_plan(payload + b"\x00")


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        ["1", "run", []],
        [1, 2, []],
        [1, "run", [[1, "local", "kv", 0, ["5"], [], None]]],
        [1, "run", [[1, "local", "kv", 0, [5.5], [], None]]],
        [1, "run", [[1, "local", "kv", 0, [5], [[0, [[0]], [], [], 1]], None]]],
        [1, "run", [[1, "local", "kv", 0, [5], [], ["hot"]]]],
        {"step": 1, "kind": "run", "items": []},
    ],
)
def test_wrong_types_are_refused(value: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_plan(msgspec.msgpack.encode(value))


def test_other_formats_are_refused() -> None:
    for payload in (b"", json.dumps([1, "run", []]).encode(), pickle.dumps([1, "run", ()])):
        with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
            decode_plan(payload)


# --- one item, worked out by hand: 5 tokens stored on two ranks, 3 new ones

ITEM = Item(
    request=1,
    mode="ring",
    ring_pass="kv",
    start=5,
    tokens=(11, 12, 13),
    shards=(
        Shard(0, ((5, 1),), ((0, 2), (5, 1)), ((8, 3),), 1),
        Shard(2, ((6, 2),), ((2, 3), (6, 2)), ((0, 4), (12, 1)), 2),
    ),
    sampling=None,
)


def change(item: Item, which: int, **fields: object) -> Item:
    shards = list(item.shards)
    shards[which] = msgspec.structs.replace(shards[which], **fields)
    return msgspec.structs.replace(item, shards=tuple(shards))


def test_what_an_item_says() -> None:
    check_item(ITEM)
    assert ITEM.shard(0) is ITEM.shards[0] and ITEM.shard(2) is ITEM.shards[1]
    assert ITEM.shard(1) is None
    assert ITEM.last_owner == 2
    assert not ITEM.ships
    assert ITEM.shards[1].new_home_runs == ((6, 2),)
    assert ITEM.shards[1].new_extents == ((3, 1), (12, 1))


def test_an_item_that_ships() -> None:
    """Rank 0 computes everything; its last two tokens' KV lives on rank 2."""
    item = change(change(ITEM, 0, q_runs=((5, 3),)), 1, q_runs=())
    check_item(item)
    assert item.ships and item.last_owner == 0


@pytest.mark.parametrize(
    "broken",
    [
        change(ITEM, 0, q_runs=()),  # nobody owns 5
        change(ITEM, 0, q_runs=((5, 2),)),  # two own 6
        change(ITEM, 1, new=1),  # 6 has no home
        change(ITEM, 0, new=2),  # an old one is said to be new
        change(ITEM, 0, extents=((8, 2),)),  # fewer slots than tokens
        change(ITEM, 1, k_runs=((3, 2), (6, 2)), extents=((0, 4),)),  # 2 is stored nowhere
        msgspec.structs.replace(ITEM, start=4),
        msgspec.structs.replace(ITEM, tokens=(11, 12)),
    ],
)
def test_check_item_sees_it(broken: Item) -> None:
    with pytest.raises(AssertionError):
        check_item(broken)


def test_nobody_owns_the_last_token() -> None:
    with pytest.raises(ValueError, match="nobody owns position 7"):
        _ = change(ITEM, 1, q_runs=((6, 1),)).last_owner
