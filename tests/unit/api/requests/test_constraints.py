"""What clients say of an answer's form, and what the engine is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from ds_cp.api.context import sampling_params
from ds_cp.api.errors import ApiError
from ds_cp.api.requests.bodies import _to_model
from ds_cp.api.requests.chat_body import ChatCompletionRequest as ChatRequest
from ds_cp.api.requests.constraints import constraint_of
from ds_cp.api.requests.protocol import CompletionRequest
from ds_cp.api.requests.strict_model import Notes
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.sampling_params import SamplingParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {"triggers": ["<t>"], "structures": [{"begin": "<t>", "schema": {}, "end": "</t>"}]}


def json_schema(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA} | more}


ASKED: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({}, None),
    ({"response_format": None, "guided_json": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"structured_outputs": {}}, None),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": json_schema(strict=True)}, {"json": SCHEMA}),
    ({"response_format": json_schema()}, {"json": SCHEMA, "lenient": True}),
    ({"response_format": json_schema(strict=False)}, {"json": SCHEMA, "lenient": True}),
    ({"response_format": json_schema(schema=None)}, {"json_object": True}),
    ({"response_format": {"type": "structural_tag", **TAG}}, {"structural_tag": TAG}),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"structured_outputs": {"choice": ["a", "b"], "json": None}}, {"choice": ["a", "b"]}),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
     {"json": SCHEMA, "disable_any_whitespace": True}),
    ({"guided_json": SCHEMA}, {"json": SCHEMA}),
    ({"guided_json": '{"type": "null"}'}, {"json": '{"type": "null"}'}),
    ({"guided_regex": "a+", "guided_choice": []}, {"regex": "a+"}),
    ({"guided_choice": ["x"], "response_format": {"type": "text"}}, {"choice": ["x"]}),
    ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
]  # fmt: skip


def read(kind: Any, body: dict[str, Any]) -> Any:
    import json

    return _to_model(json.dumps(body).encode(), kind, Notes(), None)


@pytest.mark.parametrize(("given", "want"), ASKED)
def test_every_spelling_is_one_constraint(
    given: dict[str, Any], want: dict[str, Any] | None
) -> None:
    expected = None if want is None else StructuredOutputsParams(**want)
    for kind, body in (
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}]}),
        (CompletionRequest, {"prompt": "x"}),
    ):
        found = read(kind, body | given)
        assert isinstance(found, kind), found
        params = sampling_params(found, max_tokens=5, logprobs=None, prompt_logprobs=None)
        got = params.structured_outputs
        if expected is None:
            assert got is None and params == SamplingParams(max_tokens=5)
        else:
            assert got is not None and got.source == expected.source
            assert got.asked_as in given and got.is_foreign == expected.is_foreign


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "dictionary"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"schema": {}}}, "response_format", "not None"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "a name and a schema"),
        ({"response_format": json_schema(name="x" * 65)}, "response_format", "1 to 64 characters"),
        ({"response_format": json_schema(name=5)}, "response_format", "1 to 64 characters"),
        ({"response_format": json_schema(strict="yes")}, "response_format", "true or false"),
        ({"response_format": json_schema(schema=[1])}, "response_format", "a JSON schema"),
        ({"response_format": json_schema(schema={"pattern": "a{99999}"})}, "response_format",
         "99999 times"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structures must be"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs", "the nearest is regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly"),
        ({"structured_outputs": [1]}, "structured_outputs", "dictionary"),
        ({"guided_json": [1]}, "guided_json", "an object, or its text"),
        ({"guided_json": {str(n): 1 for n in range(65)}}, "guided_json", "65 keys"),
        ({"guided_regex": "a\\"}, "guided_regex", "half an escape"),
        ({"guided_choice": ["a", 5]}, "guided_choice", ""),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "send one"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
         "structured_outputs", "response_format and structured_outputs both"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "grammar"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens", "grammar"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_the_clients_name(
    given: dict[str, Any], param: str, words: str
) -> None:
    found = read(ChatRequest, {"messages": [{"role": "user", "content": "x"}]} | given)
    if not isinstance(found, ApiError):
        from ds_cp.errors import RequestError

        with pytest.raises(RequestError) as caught:
            sampling_params(found, max_tokens=5, logprobs=None, prompt_logprobs=None)
        assert caught.value.param == param and words in str(caught.value)
        return
    assert str(found.param).startswith(param) and words in found.detail, found.detail
    assert found.status_code == 400 and len(found.detail) < 300


def test_a_mapping_without_models() -> None:
    found = constraint_of({"response_format": {"type": "json_object"}})
    assert found is not None and found.asked_as == "response_format"
