"""JSON in pieces equals JSON as a whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.api.answers import json_pieces, paced
from ds_cp.api.answers.json_pieces import (
    EncodedList,
    encode,
    items_of,
    json_array,
    json_integers,
    json_object,
    json_text,
)
from ds_cp.api.answers.paced import Turns

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=30,
)  # fmt: skip


def whole(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def pieces(value: Any) -> Iterator[bytes]:
    """Every object, list and text of a value in pieces."""
    if isinstance(value, dict):
        return json_object({name: pieces(item) for name, item in value.items()})
    if isinstance(value, list):
        return json_array(map(pieces, value))
    return json_text(value) if isinstance(value, str) else iter([encode(value)])


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_a_tree_of_pieces_is_the_value(value: Any) -> None:
    assert b"".join(pieces(value)) == whole(value)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(VALUES, max_size=4), max_size=6), st.lists(VALUES, max_size=4))
def test_a_list_from_runs_of_items(runs: list[list[Any]], rest: list[Any]) -> None:
    """Runs may be empty, encoded one by one or grown; single values may come between."""
    grown = EncodedList()
    sizes = [grown.extend(run) for run in runs]
    everything = [item for run in runs for item in run]
    assert b"".join(json_array([grown.items()])) == whole(everything)
    assert sum(sizes) == len(whole(everything)) - 2
    mixed = json_array([*map(items_of, runs), grown.items(), *rest, iter([b"", b""]), b""])
    assert b"".join(mixed) == whole([*everything, *everything, *rest])


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_long_values_in_pieces_of_any_size(monkeypatch: Any, size: int) -> None:
    for name in ("TEXT_CHARS", "LIST_ITEMS", "LIST_BYTES"):
        monkeypatch.setattr(json_pieces, name, size)
    text = 'a "quoted"\\ \n\u0000\u20ac\U0001f600 text ' * 50
    assert b"".join(json_text(text)) == whole(text)
    halves = bytearray(whole(text[100:])[1:-1])
    parts = list(json_text(text[:100], halves))
    assert b"".join(parts) == whole(text)
    assert max(map(len, parts)) <= max(6 * size, 1)
    numbers = list(range(-200, 3000))
    assert b"".join(json_integers(numbers)) == whole(numbers)
    assert b"".join(json_integers([])) == b"[]"


def test_what_json_has_not_is_an_error() -> None:
    with pytest.raises(ValueError):
        list(json_array([1.0, float("nan")]))


def test_large_answers_take_turns(monkeypatch: Any) -> None:
    """However many large answers are made at once, one batch is made in a turn of the loop."""
    monkeypatch.setattr(paced, "BATCH_BYTES", 10)
    made: list[int] = []
    ticks = [0]

    def numbers(name: int) -> Iterator[bytes]:
        for _ in range(100):
            made.append(ticks[0])
            yield b"x"

    async def read(turns: Turns, name: int) -> bytes:
        batches = turns.pace(numbers(name))
        data = b""
        while (batch := await batches.next()) is not None:
            assert 0 < len(batch) <= 10
            data += batch
        return data

    async def main() -> None:
        turns = Turns()
        reading = [asyncio.create_task(read(turns, name)) for name in range(8)]
        while not all(task.done() for task in reading):
            ticks[0] += 1
            await asyncio.sleep(0)
        assert [task.result() for task in reading] == [b"x" * 100] * 8

    asyncio.run(main())
    first = made[0]
    later = [tick for tick in made if tick > first + 1]
    assert made.count(first) <= 90  # the first batch of each comes at once: most have no other
    assert max(later.count(tick) for tick in set(later)) <= 10
