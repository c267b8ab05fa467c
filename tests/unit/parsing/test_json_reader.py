"""The reader of JSON against Python's, in any split; and objects that are calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.parsing.call_object import CallObject
from ds_cp.parsing.convert import as_json, types_of
from ds_cp.parsing.json_reader import MAX_DEPTH, JsonReader, is_json
from ds_cp.text import JsonError, parse_json
from tests.unit.parsing.answers import cut

CUTS = st.lists(st.integers(0, 200), max_size=6)
TEXT = st.text(max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def read(pieces: list[str]) -> tuple[JsonReader, str, str]:
    """The reader, what it passed on, and what it left."""
    reader, out, left = JsonReader(), list[str](), ""
    for piece in pieces:
        if left:
            left += piece
            continue
        end = reader.push(piece, 0, out)
        left = piece[end:]
    return reader, "".join(out), left


@given(VALUES, st.booleans(), st.sampled_from(["", " ", "}", ",[", "x"]), CUTS)
@settings(max_examples=200)
def test_a_value_ends_where_it_ends(value: Any, ascii_: bool, rest: str, places: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=ascii_, indent=None if ascii_ else 1)
    if rest == "x" and not isinstance(value, str | list | dict):
        rest = ""  # a longer word
    reader, passed, left = read(cut(text + rest, places))
    if not rest:
        reader.end()
    assert reader.done and not reader.bad
    assert (passed, left) == (text, rest)


JSON_LIKE = st.lists(
    st.sampled_from(['"', "\\", "\\u00e", "{", "}", "[", "]", ",", ":", "1", "-", ".5", "e3", "0",
                     "true", "null", " ", "a", '"k":', "\\n", "NaN"]),
    max_size=9,
).map("".join)  # fmt: skip


@given(JSON_LIKE, CUTS)
@settings(max_examples=400)
def test_what_python_refuses_is_refused(text: str, places: list[int]) -> None:
    try:
        parse_json(text)
        good = True
    except JsonError as err:
        good = err.key is not None  # a key given twice is strange, but JSON
    reader, _, left = read(cut(text, places))
    reader.end()
    assert (reader.done and not left.strip(" \n")) == good


def test_depth_and_numbers_are_bounded() -> None:
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "[")
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "[")
    assert is_json("1" * 1024, "1") and not is_json("1" * 1025, "1")
    assert not is_json("٣", "٣") and not is_json("", "{") and not is_json("[1] 2", "[")


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), VALUES, st.integers(0, 5), CUTS)
@settings(max_examples=150)
def test_a_call_is_read_from_an_object_whatever_else_it_has(
    arguments: dict[str, Any], other: Any, order: int, places: list[int]
) -> None:
    members = [("name", "f.g-1"), ("arguments", arguments), ("other", other)]
    members = [members[(i + order) % 3] for i in range(3)][:: 1 if order < 3 else -1]
    call, taken = CallObject(), ""
    for piece in cut(json.dumps(dict(members)), places):
        assert call.push(piece, 0) == len(piece)
        if call.ready:
            taken += call.take()
    assert call.done and call.name == "f.g-1" and json.loads(taken) == arguments


@pytest.mark.parametrize(
    ("text", "types", "expected"),
    [
        ("5", {"string"}, "5"),
        ("5", {"integer"}, 5),
        ("3.0", {"integer"}, 3),
        ("3.5", {"integer"}, "3.5"),
        ("+.5", {"number"}, 0.5),
        ("1e3", {"number"}, 1e3),
        ("nan", {"number"}, "nan"),
        ("1_0", {"number"}, "1_0"),
        (" True\n", {"boolean"}, True),
        ("yes", {"boolean"}, "yes"),
        ("None", {"null", "string"}, None),
        ("null", {"string"}, "null"),
        ('{"a": [1]}', {"object"}, {"a": [1]}),
        ("{'a': 1}", {"object"}, "{'a': 1}"),
        ('[1, "x"]', {"array"}, [1, "x"]),
        ("9" * 5000, {"integer"}, "9" * 5000),
        ('{"a": 1}', set(), {"a": 1}),
        ("007", set(), "007"),
        ("a\tb", set(), "a\tb"),
    ],
)
def test_a_text_becomes_a_value_of_its_schema(text: str, types: set[str], expected: Any) -> None:
    found = json.loads(as_json(text, frozenset(types)))
    assert found == expected and type(found) is type(expected)


def test_types_are_found_in_a_schema_that_refers_to_itself() -> None:
    root: dict[str, Any] = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}
    assert types_of({"$ref": "#/$defs/a"}, root) == {"null"}
    assert types_of({"enum": [1, "a", True]}, root) == {"integer", "string", "boolean"}
    assert types_of({"type": ["number", "null"]}, root) == {"number", "null"}
    assert types_of({"$ref": "http://x"}, root) == types_of({}, root) == types_of(5, root) == set()
