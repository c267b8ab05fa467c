"""What is left out of a conversation that is too long, and what never is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.api.responses.items import call_item, reasoning_item, text_item
from ds_cp.api.responses.truncation import units_of


def said(letters: str) -> list[Any]:
    """Items: s d u a r (roles and reasoning), and calls c and their results o, by number."""
    made = {
        "s": lambda: text_item("system", "x"), "d": lambda: text_item("developer", "x"),
        "u": lambda: text_item("user", "x"), "a": lambda: text_item("assistant", "x"),
        "r": lambda: reasoning_item("x"),
    }  # fmt: skip
    items: list[Any] = []
    for word in letters.split():
        if word[0] == "c":
            items.append(call_item(word, "f", "{}"))
        elif word[0] == "o":
            items.append({"type": "function_call_output", "call_id": f"c{word[1:]}", "output": "x"})
        else:
            items.append(made[word]())
    return items


@pytest.mark.parametrize(
    ("letters", "units"),
    [
        ("u", []),
        ("s u", []),
        ("s u a u", [{1, 2}]),
        ("u r a u a u", [{0, 1, 2}, {3, 4}]),
        ("a u a u", [{0}, {1, 2}]),
        ("u u s a d u", [{0}, {1, 3}]),
        ("u c1 o1 a u", [{0, 1, 2, 3}]),
        # An agent's own steps, but not the newest.
        ("u c1 o1", []),
        ("u r c1 c2 o1 o2 r c3 o3", [{1, 2, 3, 4, 5}]),
        ("u a u c1 o1 a c2 o2 c3 o3", [{0, 1}, {3, 4}, {5, 6, 7}]),
        ("c1 o1 c2 o2", [{0, 1}]),
        # A result that comes late goes with its call.
        ("u c1 u a u o1", [{0, 1, 5}, {2, 3}]),
    ],
)
def test_what_may_be_left_out(letters: str, units: list[set[int]]) -> None:
    assert units_of(said(letters)) == units


@given(st.lists(st.sampled_from("s u a r c o".split()), max_size=30), st.integers(0, 30))
def test_what_stays(kinds: list[str], count: int) -> None:
    words, calls, answered = [], 0, 0
    for kind in kinds:
        if kind == "c":
            calls += 1
            words.append(f"c{calls}")
        elif kind == "o" and answered < calls:
            answered += 1
            words.append(f"o{answered}")
        elif kind != "o":
            words.append(kind)
    units = units_of(said(" ".join(words)))
    gone = set[int]().union(*units[:count])
    assert sum(map(len, units)) == len(set[int]().union(*units))  # each item is in one at most
    kept = [word for index, word in enumerate(words) if index not in gone]
    assert kept.count("s") == words.count("s")
    users = [index for index, word in enumerate(words) if word == "u"]
    assert not users or users[-1] not in gone
    for word in kept:
        if word[0] == "o":
            assert f"c{word[1:]}" in kept
        if word[0] == "c" and f"o{word[1:]}" in words:
            assert f"o{word[1:]}" in kept
    if words and gone:
        first = next(word for word in kept if word != "s")
        assert not users or first == "u" or words.index("u") > len(gone)
