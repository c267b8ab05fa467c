"""What a caller may ask for: kinds, sizes, and the field that a refusal names."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from ds_cp.errors import RequestError
from ds_cp.grammar import limits
from ds_cp.grammar.constraint import StructuredOutputsParams, as_params
from ds_cp.sampling_params import SamplingParams


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


TAG = {"triggers": ["<t>"], "structures": [{"begin": "<t>", "schema": {}, "end": "</t>"}]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of"),
    ({"json_object": False}, "exactly one of"),
    ({"json": {}, "regex": "a"}, "it has json, regex"),
    ({"json": 5}, "JSON schema"),
    ({"json": [1]}, "JSON schema"),
    ({"json": "{"}, "not valid JSON"),
    ({"json": '{"a": 1, "a": 2}'}, "given twice"),
    ({"json": '"text"'}, "JSON schema"),
    ({"json": " " * (limits.MAX_SOURCE_BYTES + 1)}, "characters; at most"),
    ({"json": {"title": "x" * limits.MAX_SOURCE_BYTES}}, "bytes; at most 131072"),
    ({"json": nested(limits.MAX_DEPTH)}, "100 levels"),
    ({"json": {"a": [0] * 70_000}}, "65536 values"),
    ({"json": {"enum": [0] * 10_001}}, "10000 values of enum"),
    ({"json": {"anyOf": [{"enum": [0] * 5001}, {"enum": [1] * 5000}]}}, "10000 values of enum"),
    ({"json": {"pattern": "a{10001}"}}, "repeats something 10001 times"),
    ({"json": {"pattern": "x" * 8193}}, "at most 8192 characters"),
    ({"json": {"minimum": math.nan}}, "a number that JSON does not know"),
    ({"json": {"minimum": 10**400}}, "integer of"),
    ({"json": {"const": {1, 2}}}, "a set"),
    ({"json": {1: 2}}, "key that is not a string"),
    ({"json": {"title": "\udc00"}}, "surrogate"),
    ({"regex": 5}, "a regex is a string"),
    ({"regex": "x" * 8193}, "at most 8192 characters"),
    ({"regex": "a{3,99999}"}, "99999 times; at most 10000"),
    ({"regex": "a{" + "9" * 500 + "}"}, "999999999999 times"),
    ({"regex": "ab\\"}, "half an escape"),
    ({"choice": "yes"}, "a list of strings"),
    ({"choice": []}, "0 strings"),
    ({"choice": ["a"] * 10_001}, "10001 strings"),
    ({"choice": ["a", 1]}, "a list of strings"),
    ({"choice": ["a", ""]}, "at least one character"),
    ({"choice": {"a": 1}}, "a list of strings"),
    ({"choice": ["x" * 2000] * 100}, "bytes; at most 131072"),
    ({"grammar": ""}, "text of a grammar"),
    ({"grammar": 5}, "text of a grammar"),
    ({"grammar": "%llguidance {}\nstart: /a/"}, "server's own"),
    ({"grammar": "start: /a{20000}/"}, "20000 times"),
    ({"grammar": 'start: "a"{ 2 , 20000 }'}, "20000 times"),
    ({"grammar": "{1,".ljust(limits.MAX_SOURCE_BYTES + 1)}, "131073 characters; at most 131072"),
    ({"json_object": "yes"}, "json_object must be true"),
    ({"json_object": True, "lenient": 1}, "lenient must be true or false"),
    ({"json_object": True, "whitespace_pattern": "a{10001}"}, "10001 times"),
    ({"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude"),
    ({"structural_tag": []}, "must be an object"),
    ({"structural_tag": {}}, "structures must be a list"),
    ({"structural_tag": TAG | {"triggers": []}}, "triggers must be a list"),
    ({"structural_tag": TAG | {"triggers": [1]}}, "triggers must be strings"),
    ({"structural_tag": TAG | {"triggers": ["<u>"]}}, "begins with no trigger"),
    ({"structural_tag": TAG | {"structures": [5]}}, "must be objects"),
    ({"structural_tag": TAG | {"structures": [{"begin": 5}]}}, "must be strings"),
    ({"structural_tag": TAG | {"at_least": 2}}, "at_least is 0 or 1"),
    ({"structural_tag": TAG | {"at_most": 0}}, "at_most from 1"),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=[words for _, words in BAD])
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**given)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize("text", ["{1,", "{1", "{", "{1, ", "{1 ,1", "{" + "1" * 50])
def test_repeats_are_found_in_linear_time(text: str) -> None:
    """In the event loop of all requests; with a quadratic search the first one takes minutes."""
    began = time.process_time()
    for hurting in (text.ljust(100_000), (text * 50_000)[:100_000]):
        StructuredOutputsParams(grammar=hurting)
    assert time.process_time() - began < 10


def test_a_schema_is_one_line_of_json_with_its_keys_in_order() -> None:
    schema = {"type": "object", "properties": {"z": {"const": "é\n/"}, "a": {}}, "x-guidance": 5}
    for given in (schema, json.dumps(schema)):
        source = StructuredOutputsParams(json=given).source
        head, start, rule = source.splitlines()
        assert head == '%llguidance {"no_forcing": true}'
        found = json.loads(rule.removeprefix("answer: %json "))
        assert found.pop("x-guidance") == {  # the caller's own does not count
            "whitespace_flexible": True,
            "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,80}",
        }
        assert list(found) == ["type", "properties"]
        assert list(found["properties"]) == ["z", "a"]


@pytest.mark.parametrize(
    ("regex", "rule"),
    [("a/b", r"/a\/b/"), (r"a\/b", r"/a\/b/"), ("a\nb", r"/a\nb/"), ("", "/(?:)/"),
     (r"a\\/", r"/a\\\//"), ("a\\\nb", r"/a\nb/")],
)  # fmt: skip
def test_a_regex_stays_between_its_slashes(regex: str, rule: str) -> None:
    assert StructuredOutputsParams(regex=regex).source.splitlines()[2] == f"answer: {rule}"


def test_fields_come_as_a_mapping_too() -> None:
    params = as_params({"regex": "a+", "choice": None})
    assert params == StructuredOutputsParams(regex="a+") and as_params(params) is params
    assert as_params(None) is None and as_params({}) is None and as_params({"json": None}) is None
    with pytest.raises(RequestError, match="no field regx; the nearest is regex"):
        as_params({"regx": "a"})
    with pytest.raises(RequestError, match="must be an object, not a str"):
        as_params("a+")


def test_sampling_params_take_a_constraint_and_what_contradicts_it_is_refused() -> None:
    params = SamplingParams(structured_outputs={"choice": ["a", "b"]})  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputsParams(choice=["a", "b"])
    assert SamplingParams(structured_outputs={}).structured_outputs is None  # type: ignore[arg-type]
    for name, value in (("min_tokens", 1), ("ignore_eos", True)):
        with pytest.raises(RequestError, match=f"{name} cannot be kept") as caught:
            SamplingParams(
                structured_outputs=StructuredOutputsParams(regex="a"),
                **{name: value},  # type: ignore[arg-type]
            )
        assert caught.value.param == name
