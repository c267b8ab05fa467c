"""Prefix keys against the chain written out with hashlib."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.kv.prefix import PrefixKeys

token = st.integers(0, 2**32 - 1)


def chain(tokens: list[int], block_size: int, salt: str) -> list[bytes]:
    """Every key of ``tokens``, from the definition."""
    key, keys = sha256(b"ds_cp" + salt.encode("utf-8")).digest(), []
    for end in range(block_size, len(tokens) + 1, block_size):
        block = tokens[end - block_size : end]
        key = sha256(key + b"".join(t.to_bytes(4, "little") for t in block)).digest()
        keys.append(key)
    return keys


@given(st.lists(token, max_size=60), st.integers(1, 7), st.text(max_size=8))
def test_keys_are_the_chain_of_hashes(tokens: list[int], block_size: int, salt: str) -> None:
    whole = len(tokens) // block_size
    keys = PrefixKeys(block_size, salt).upto(tokens, whole)
    assert keys == chain(tokens, block_size, salt)
    assert len(set(keys)) == whole


def test_one_key_worked_out_by_hand() -> None:
    root = sha256(b"ds_cptenant").digest()
    expected = sha256(root + bytes([1, 0, 0, 0, 0, 1, 0, 0])).digest()
    assert PrefixKeys(2, "tenant").upto([1, 256, 7], 1) == [expected]


@given(st.lists(token, max_size=60), st.lists(st.integers(0, 60), max_size=6), st.integers(1, 5))
def test_growing_by_and_by_equals_one_go(
    tokens: list[int], lengths: list[int], block_size: int
) -> None:
    keys, expected = PrefixKeys(block_size, "s"), chain(tokens, block_size, "s")
    grown: list[int] = []
    for length in lengths:
        grown = tokens[: max(length, len(grown))]
        count = min(length, len(grown)) // block_size
        assert keys.upto(grown, count) == expected[:count]
    assert keys.upto(tuple(tokens), len(tokens) // block_size) == expected


def test_a_key_is_computed_once() -> None:
    """A later call reads only the new blocks: what lies before may be anything then."""
    keys = PrefixKeys(2, "")
    first = keys.upto([1, 2, 3, 4], 2)
    assert keys.upto([0, 0, 0, 0, 5, 6], 3) == chain([1, 2, 3, 4, 5, 6], 2, "")
    assert first == keys.upto([], 0) + keys.upto([0, 0, 0, 0], 2)


def test_the_answer_belongs_to_the_caller() -> None:
    keys = PrefixKeys(1, "")
    keys.upto([1, 2], 2).clear()
    assert keys.upto([1, 2], 2) == chain([1, 2], 1, "")


@given(st.lists(token, min_size=1, max_size=40), st.integers(1, 5), st.data())
def test_one_changed_token_changes_its_key_and_all_later_ones(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    whole = len(tokens) // block_size
    before = PrefixKeys(block_size, "s").upto(tokens, whole)
    after = PrefixKeys(block_size, "s").upto(changed, whole)
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [i < at // block_size for i in range(whole)]


def test_salts_and_block_sizes_share_nothing() -> None:
    tokens = list(range(24))
    kinds = [(2, ""), (2, "a"), (2, "b"), (2, "ä"), (4, ""), (4, "a"), (3, "a")]
    seen = [key for size, salt in kinds for key in PrefixKeys(size, salt).upto(tokens, 24 // size)]
    assert len(seen) == len(set(seen)) == sum(24 // size for size, _ in kinds)


def test_only_whole_blocks_have_keys() -> None:
    keys = PrefixKeys(4, "")
    assert keys.upto([1, 2, 3], 0) == []
    with pytest.raises(ValueError, match="7 tokens are 1 whole blocks of 4, keys of 2 asked for"):
        keys.upto(list(range(7)), 2)
    with pytest.raises(ValueError, match="keys of -1"):
        keys.upto(list(range(7)), -1)
    with pytest.raises(ValueError, match="block_size >= 1, got 0"):
        PrefixKeys(0, "")
    assert len(keys.upto(list(range(8)), 2)) == 2  # a refused call has left nothing behind
