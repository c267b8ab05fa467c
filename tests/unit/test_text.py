"""Strict JSON, sizes, and the closest name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.text import (
    JsonError,
    allowed,
    closest,
    misspelt,
    nearest,
    parse_json,
    parse_size,
    shorten,
    show,
)


@given(
    st.integers(0, 10**12),
    st.sampled_from(["B", "kB", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]),
)
def test_parse_size_is_a_product(number: int, unit: str) -> None:
    power = "BKMGT".index(unit[0].upper())
    base = 1024 if "i" in unit else 1000
    assert parse_size(f"{number}{unit}") == number * base**power


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_parse_json_reads_what_json_writes(value: Any) -> None:
    if "Infinity" not in json.dumps(value):
        assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "message", "key"),
    [
        ('{"a": 1, "a": 1}', 'not usable JSON: key "a" is given twice', "a"),
        ('[{"b": {"x": 1, "y": 2, "y": 3, "x": 4}}]', 'not usable JSON: key "x" is given', "x"),
        ('{"\\u0061": 1, "a": 2}', 'not usable JSON: key "a" is given twice', "a"),
        ('{"": 1, "": 2}', 'not usable JSON: key "" is given twice', ""),
        ('{"a": NaN}', "not valid JSON: NaN is not a JSON number", None),
        ("[-Infinity]", "not valid JSON: -Infinity is not a JSON number", None),
        ("9" * 5000, "not valid JSON: a number has too many digits", None),
        ("[" * 100_000, "not valid JSON: nested too deeply", None),
        ('{"a": 1,\n "b"}', "not valid JSON at line 2, column 5", None),
        ("", "not valid JSON at line 1, column 1", None),
        ("{} {}", "not valid JSON at line 1, column 4: Extra data", None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_not_strict_json(text: str, message: str, key: str | None) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(message) and caught.value.key == key
    assert len(str(caught.value)) < 200


def test_the_same_key_in_two_objects_is_fine() -> None:
    assert parse_json('[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


def test_closest_is_one_that_is_like_it() -> None:
    names = ["temperature", "top_p", "top_k"]
    assert closest("temprature", names) == "temperature"
    assert closest("TOP_P", names) == "top_p"
    assert closest("zzz", names) is None
    assert closest("zzz", names, 0.0) in names
    assert closest("x" * 10**6, names) is None  # only its beginning is compared


NAMES = ["temperature", "top_p", "top_k", "n", "stop", "seed", "model", "max_tokens", "user"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"), ("TEMPERATUER", "temperature"),
        ("tmpratur", None), ("top-p", "top_p"), ("topK", "top_k"), ("N", "n"), ("m", None),
        ("id", None), ("sotp", "stop"), ("stpo", "stop"), ("opts", None), ("step", "stop"),
        ("models", "model"), ("max tokens", "max_tokens"), ("maxtoken", "max_tokens"),
        ("max_new_tokens", None), ("stop_id", None), ("modelId", None), ("model_ids", None),
        ("user-ids", None), ("mode_l", "model"), ("temper_ature", "temperature"),
        ("", None), ("_", None), ("x" * 10**6, None),
    ],
)  # fmt: skip
def test_misspelt_is_a_slip_or_two(name: str, meant: str | None) -> None:
    assert misspelt(name, NAMES) == meant


@given(st.sampled_from(NAMES), st.integers(0, 20), st.sampled_from("axz_"), st.booleans())
def test_one_slip_in_a_long_enough_name_is_found(name: str, at: int, by: str, drop: bool) -> None:
    if len(name.replace("_", "")) >= 5:
        at %= len(name)
        slip = name[:at] + ("" if drop else by) + name[at + 1 :]
        assert misspelt(slip, [name]) == name


@pytest.mark.usefixtures("settled_heap")
def test_only_what_is_shown_of_a_long_text_is_looked_at() -> None:
    begun = time.thread_time()
    assert shorten("é" * 2**23, 10) == "é" * 7 + "..."
    assert show("é" * 2**23) == '"' + "é" * 76 + "..."
    assert time.thread_time() - begun < 0.05


def test_shown_values_are_one_short_line() -> None:
    assert shorten("a\nb\0c") == "a b c"
    assert shorten("x" * 100, 10) == "xxxxxxx..."
    assert show({"a": [1, "ü"]}) == '{"a": [1, "ü"]}'
    assert show(object()) == "of type object"


def test_what_a_schema_admits_in_words() -> None:
    text = {"type": "string", "minLength": 1, "maxLength": 9}
    texts = {"type": "array", "items": text, "maxItems": 3}
    for schema, words in (
        (texts, "a list, each item a string of 1 to 9 characters"),
        (
            {"anyOf": [texts, {"type": "null"}]},
            "a list, each item a string of 1 to 9 characters or null",
        ),
        ({"anyOf": [text, texts]}, "a string of 1 to 9 characters or a list of such"),
    ):
        assert allowed(schema) == words


@given(st.text(min_size=1))
def test_nearest_always_names_a_valid_key(key: str) -> None:
    assert nearest(key, ["a.block", "a.size"], ["a.block", "a.size", "b.mode"]) in (
        "a.block",
        "a.size",
        "b.mode",
    )
