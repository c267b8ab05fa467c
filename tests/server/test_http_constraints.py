"""Structured outputs over HTTP from a real server of two ranks, by the openai client: answers are
valid by ``jsonschema`` and Python's ``re``, streamed or not, on one rank and over both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from tests.helpers.jobs import Job, command
from tests.helpers.tiny import LONG, make_tiny_model
from tests.server.conftest import wait_for

ANSWER_S = 120.0  # for one answer, on a busy machine
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "né"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# A random model loves blanks or does not; between the tokens of JSON there may be many.
ALPHABET = sorted(ByteLevel.alphabet())
NO_BLANKS = {str(ALPHABET.index(sign)): -100 for sign in "ĠĊĉč"}
# Rules of rules: the library walks them by recursion, and the stack of its process overflows.
CHAIN = "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(2900)) + '\na2900: "x"'
LONG_CHAT = [{"role": "user", "content": LONG}]  # more than one rank holds
SHORT_CHAT = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Served:
    url: str
    client: Any  # an openai.OpenAI, whose unions need a check a line

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Any:
        asked = {"max_tokens": 200, "temperature": 0, "logit_bias": NO_BLANKS} | fields
        return self.client.chat.completions.create(model="tiny", messages=messages, **asked)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(
            f"{self.url}/state?once=1", timeout=ANSWER_S, verify=False
        ).json()
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("constraints")
    file = work / "config.json"
    file.write_text(json.dumps({
        "model": str(make_tiny_model(work / "tiny")), "dtype": "fp32", "threads_per_rank": 1,
        "kv_cache": {"tokens_per_rank": 208, "block_size": 16},
        "server": {"port": 0, "served_model_name": "tiny"},
    }))  # fmt: skip
    job = Job(command("ds-cp", "serve", 2, ["--config", str(file)]), work)
    try:
        url = job.ready()
        client = openai.OpenAI(
            base_url=url + "/v1", api_key="none", max_retries=0, timeout=ANSWER_S
        )
        yield Served(url, client)
    finally:
        job.close()


def by_schema(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {"name": "answer", "schema": schema, "strict": True, **more}
    return {"type": "json_schema", "json_schema": named}


def valid(text: str) -> None:
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("messages", [SHORT_CHAT, LONG_CHAT], ids=["one rank", "both ranks"])
def test_a_schema_is_kept_streamed_or_not(served: Served, messages: list[dict[str, Any]]) -> None:
    form = by_schema(PERSON)
    [whole] = served.chat(messages, response_format=form).choices
    assert whole.finish_reason == "stop"
    valid(whole.message.content)
    more = {"stream": True, "stream_options": {"include_usage": True}}
    ids = {"return_token_ids": True}  # a server that is late joins events, and loses no token
    chunks = list(served.chat(messages, response_format=form, extra_body=ids, **more))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.delta.content or "" for part in parts) == whole.message.content
    tokens = [token for part in parts for token in getattr(part, "token_ids", None) or ()]
    assert len(tokens) == chunks[-1].usage.completion_tokens > 5
    assert parts[-1].finish_reason == "stop"
    ended = served.state()["picture"]["recent"][-1]
    assert (ended["modes"] == ["local"]) == (messages is SHORT_CHAT), ended


def test_many_at_once_each_with_its_own(served: Served) -> None:
    """More than fits at once, so that some wait or are preempted."""
    both = [SHORT_CHAT, LONG_CHAT]

    def ask(n: int) -> list[str]:
        how = {"temperature": 1.2, "seed": n, "n": 1 + n % 2}
        if n % 3 == 0:
            how["structured_outputs"] = {"regex": f"[a-z]{{{n + 1}}}-{n}"}
        else:
            how["response_format"] = by_schema({"enum": [f"{n}", {"n": n}]})
        extra = {k: how.pop(k) for k in ("structured_outputs",) if k in how}
        answer = served.chat(both[n % 2], extra_body=extra, **how)
        return [choice.message.content for choice in answer.choices]

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, range(12)))
    for n, texts in enumerate(answers):
        assert len(texts) == 1 + n % 2
        for text in texts:
            if n % 3 == 0:
                assert re.fullmatch(f"[a-z]{{{n + 1}}}-{n}", text)
            else:
                assert json.loads(text) in (f"{n}", {"n": n})


def test_completions_and_older_fields(served: Served) -> None:
    extra = {"guided_choice": ["yes", "né"]}
    answer = served.client.completions.create(
        model="tiny", prompt=["x", LONG[:140]], max_tokens=9, extra_body=extra
    )
    assert {choice.text for choice in answer.choices} <= {"yes", "né"}
    cut = served.chat(SHORT_CHAT, response_format={"type": "json_object"}, max_tokens=1)
    assert (cut.choices[0].finish_reason, cut.choices[0].message.content) == ("length", "{")


def test_what_cannot_be_kept_is_refused_and_others_go_on(served: Served) -> None:
    with served.chat(SHORT_CHAT, response_format=by_schema(PERSON), stream=True) as going:
        first = next(iter(going))
        bombs: list[tuple[dict[str, Any], str, str]] = [
            ({"response_format": by_schema({"not": {}})}, "response_format", "not"),
            ({"guided_regex": "(" * 4000}, "guided_regex", "guided_regex: "),
            ({"guided_grammar": "start: " + "{1," + " " * 120_000}, "guided_grammar", ""),
            ({"guided_grammar": CHAIN}, "guided_grammar", "does not compile within"),
            ({"guided_json": {"enum": list(range(10_001))}}, "guided_json", "10000 values"),
        ]
        for body, field, words in bombs:
            with pytest.raises(openai.BadRequestError) as caught:
                served.chat(SHORT_CHAT, extra_body=body)
            assert caught.value.param == field and words in str(caught.value.message)
        rest = "".join(c.choices[0].delta.content or "" for c in going if c.choices)
    valid((first.choices[0].delta.content or "") + rest)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


# Schemas that explode, each in its own way: those that are refused, and those that are kept, since
# a grammar does not unfold them and each of its steps is bounded.
REFUSED: dict[str, dict[str, Any]] = {
    "deep": nested(101),
    "recursive": {"$ref": "#"},
    "huge enum": {"properties": {"x": {"enum": list(range(10_001))}}},
    "regex repeated often": {"properties": {"x": {"type": "string", "pattern": "(a|b?){10001}"}}},
}
KEPT: dict[str, dict[str, Any]] = {
    "recursive through others": {
        "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}},
        "properties": {"x": {"$ref": "#/$defs/a"}},
    },
    "nested repeats": {"properties": {"x": {"type": "string", "pattern": "((a{999}){999}){999}"}}},
    "many stars": {
        "properties": {"x": {"type": "string", "pattern": ".*".join("abcdefghij" * 4) + "{99}"}}
    },
    "all of any of": {
        "allOf": [
            {"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}} for j in range(9)]}
            for i in range(9)
        ]
    },
}
HELLO = [{"role": "user", "content": "Hi"}]
STRICT: dict[str, Any] = {"name": "f", "strict": True}


def in_fields(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Everywhere where a schema can be: the path, the body's fields, and the one that is named."""
    schema = {"type": "object"} | schema
    chat, responses, messages = "/v1/chat/completions", "/v1/responses", "/v1/messages"
    function = STRICT | {"parameters": schema}
    output = {"format": {"type": "json_schema", "schema": schema}}
    text = {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": schema}}
    return [
        (chat, {"response_format": by_schema(schema)}, "response_format"),
        (chat, {"structured_outputs": {"json": schema}}, "structured_outputs"),
        (chat, {"guided_json": schema}, "guided_json"),
        (
            chat,
            {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
            "tools",
        ),
        ("/v1/completions", {"guided_json": json.dumps(schema)}, "guided_json"),
        (responses, {"text": text}, "text.format"),
        (
            responses,
            {"tools": [function | {"type": "function"}], "tool_choice": "required"},
            "tools",
        ),
        (messages, {"output_config": output}, "output_config.format"),
        (
            messages,
            {"tools": [STRICT | {"input_schema": schema}], "tool_choice": {"type": "any"}},
            "tools",
        ),
    ]


@pytest.mark.parametrize("how", REFUSED | KEPT)
def test_a_schema_that_explodes(served: Served, how: str) -> None:
    """In every field that takes one, in bounded time and while a stream goes on: refused by the
    field's name in the protocol's own shape, or kept."""
    inputs: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "Hi"},
        "/v1/responses": {"input": "Hi"},
    }
    with served.chat(SHORT_CHAT, response_format=by_schema(PERSON), stream=True) as going:
        first = next(iter(going))
        for path, fields, named in in_fields((REFUSED | KEPT)[how]):
            body = inputs.get(path, {"messages": HELLO}) | fields
            body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = 5
            reply = httpx.post(served.url + path, json=body, timeout=ANSWER_S)
            if how in KEPT and reply.status_code == 200:
                continue
            assert reply.status_code == 400, (path, named, reply.text[:500])
            error = reply.json()["error"]
            if named == "tools" and re.search("maximum context length|needs KV", error["message"]):
                continue  # they are in the prompt
            assert named in error["message"], (path, error)
            if path == "/v1/messages":
                assert reply.json()["type"] == "error" and set(error) == {"type", "message"}
            else:
                assert error["param"].startswith(named), (path, error)
        rest = "".join(c.choices[0].delta.content or "" for c in going if c.choices)
    valid((first.choices[0].delta.content or "") + rest)


OTHERS: dict[str, list[Any]] = {  # fields of structured_outputs and what they cannot be
    "regex": ["(" * 4000, "(a|b?){10001}", "x" * 8193],
    "choice": [["a"] * 10_001, ["x" * 2000] * 100],
    "grammar": [CHAIN, "start: " + "{1," + " " * 120_000, "start: /(a|b?){10001}/"],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_else_explodes_is_refused(served: Served, kind: str) -> None:
    for value in OTHERS[kind]:
        for path, body in (
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/chat/completions", {"messages": HELLO}),
        ):
            for field, wish in ((f"guided_{kind}", value), ("structured_outputs", {kind: value})):
                reply = httpx.post(
                    served.url + path, json=body | {field: wish, "max_tokens": 5}, timeout=ANSWER_S
                )
                assert reply.status_code == 400, (path, field, str(value)[:50], reply.text[:300])
                error = reply.json()["error"]
                assert error["param"] == field and field in error["message"], error


@pytest.mark.parametrize(
    "regex", ["((a{999}){999}){999}", "(a|b?)" * 1300, "(x+x+)+y", "(.*a){99}"]
)
def test_a_regex_that_hurts_others(served: Served, regex: str) -> None:
    """Nested repeats and choices that a matcher by trial would never be through with: kept, or its
    field is named once a step would take too much."""
    body = {"messages": HELLO, "guided_regex": regex, "max_tokens": 30}
    reply = httpx.post(served.url + "/v1/chat/completions", json=body, timeout=ANSWER_S)
    if reply.status_code == 200:
        assert 1 <= reply.json()["usage"]["completion_tokens"] <= 30
    else:
        assert reply.status_code == 400, reply.text
        assert "guided_regex" in reply.json()["error"]["message"]


def test_a_client_that_leaves_ends_its_request(served: Served) -> None:
    form = by_schema({"type": "string", "minLength": 180})
    with served.chat(SHORT_CHAT, response_format=form, stream=True) as going:
        next(iter(going))
        assert served.state()["picture"]["num_running"] == 1
    assert wait_for(lambda: served.state()["picture"]["num_running"] == 0, ANSWER_S)
