"""Packed log-probabilities are the same ones, in a few bytes."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from ds_cp.outputs import PackedLogprobs, TokenLogprob

IDS = st.integers(0, 2**31 - 1)
LOGPROBS = st.floats(allow_nan=False)
ITEMS = st.none() | st.builds(
    TokenLogprob,
    IDS,
    LOGPROBS,
    st.lists(st.tuples(IDS, LOGPROBS), max_size=4).map(tuple),
    st.integers(0, 2**40),
)


@given(st.lists(ITEMS, max_size=12))
def test_they_are_the_same(items: list[TokenLogprob | None]) -> None:
    packed = PackedLogprobs.of(items)
    assert list(packed) == [packed[at] for at in range(len(packed))] == items
    assert packed[1:5:2] == items[1:5:2] and packed[-3:] == items[-3:]
    assert bool(packed) == bool(items) and len(packed) == len(items)


def test_they_are_small() -> None:
    """What the HTTP application counts for them."""
    from ds_cp.api.answers.budget import PACKED_BYTES, PACKED_TOKEN_BYTES

    for top in (0, 20):
        row = tuple((i, -1.5 - i) for i in range(top))
        tracemalloc.start()
        packed = PackedLogprobs.of(TokenLogprob(1000 + i, -i / 3, row) for i in range(5000))
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(packed) == 5000
        assert size <= 5000 * (PACKED_TOKEN_BYTES + PACKED_BYTES * (top + 1))
