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


def test_a_client_that_leaves_ends_its_request(served: Served) -> None:
    form = by_schema({"type": "string", "minLength": 180})
    with served.chat(SHORT_CHAT, response_format=form, stream=True) as going:
        next(iter(going))
        assert served.state()["picture"]["num_running"] == 1
    assert wait_for(lambda: served.state()["picture"]["num_running"] == 0, ANSWER_S)
