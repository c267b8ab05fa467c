"""Bad input: a 400 in OpenAI's shape, one line that names the field; the engine sees nothing."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest

from ds_cp.errors import CapacityError, CommError, EngineDeadError, QueueFullError, RequestError
from tests.server.conftest import PATIENCE_S, Running, error_of

C = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


FIELDS: list[tuple[str, dict[str, Any], str | None, str]] = [
    (C, {}, "prompt", "missing"),
    (C, {"prompt": ""}, "prompt", "empty"),
    (C, {"prompt": []}, "prompt", "empty"),
    (C, {"prompt": [[]]}, "prompt", "empty"),
    (C, {"prompt": ["a", ""]}, "prompt", "empty"),
    (C, {"prompt": 5}, "prompt", "string"),
    (C, {"prompt": {"text": "x"}}, "prompt", "string"),
    (C, {"prompt": [1, "a"]}, "prompt", "string"),
    (C, {"prompt": [1.5]}, "prompt", "string"),
    (C, {"prompt": [True]}, "prompt", "string"),
    (C, {"prompt": "\ud800"}, "prompt", "not text"),
    (C, {"prompt": [99999]}, "prompt", "outside the vocabulary"),
    (C, {"prompt": [-1]}, "prompt", "outside the vocabulary"),
    (C, {"prompt": [10**30]}, "prompt", "outside the vocabulary"),
    (C, {"prompt": ["a"] * 65}, "prompt", "at most 64"),
    (C, {"prompt": [5] * 129}, "prompt", "need 130, have 128"),
    (C, {"prompt": [5] * 100, "max_tokens": 29}, "max_tokens", "need 129, have 128"),
    (C, {"prompt": [5] * 100, "min_tokens": 60}, "min_tokens", "min_tokens"),
    (C, {"prompt": "x" * (32 * 128 + 1)}, None, "4097 characters"),
    (C, {"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    (C, {"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    (C, {"prompt": "x", "max_tokens": 10**40}, "max_tokens", "max_tokens"),
    (C, {"prompt": "x", "max_tokens": "5"}, "max_tokens", "integer"),
    (C, {"prompt": "x", "max_tokens": True}, "max_tokens", "integer"),
    (C, {"prompt": "x", "temperature": -0.1}, "temperature", "-0.1"),
    (C, {"prompt": "x", "temperature": 2.1}, "temperature", "2.1"),
    (C, {"prompt": "x", "temperature": "hot"}, "temperature", "'hot'"),
    (C, {"prompt": "x", "top_p": -0.1}, "top_p", "top_p is -0.1"),
    (C, {"prompt": "x", "top_p": 0, "temperature": 3}, "temperature", "temperature is 3"),
    (C, {"prompt": "x", "seed": 2**64}, "seed", "seed"),
    (C, {"prompt": "x", "stop": [""]}, "stop", "stop"),
    (C, {"prompt": "x", "stop": 7}, "stop", "string"),
    (C, {"prompt": "x", "stop": ["a"] * 17}, "stop", "at most 16"),
    (C, {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias", "'x' is not a token id"),
    (C, {"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
    (C, {"prompt": "x", "logit_bias": {"5": 1, "05": 2}}, "logit_bias", "token id 5 twice"),
    (C, {"prompt": "x", "logit_bias": {"9999": 1}}, "logit_bias", "outside the vocabulary"),
    (C, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", "101"),
    (C, {"prompt": "x", "logit_bias": {"1": "a"}}, "logit_bias", "'a'"),
    (C, {"prompt": "x", "stop_token_ids": [9999]}, "stop_token_ids", "outside"),
    (C, {"prompt": "x", "logprobs": 21}, "logprobs", "21"),
    (C, {"prompt": "x", "logprobs": 21, "echo": True}, "logprobs", "21"),
    (C, {"prompt": [5] * 128, "max_tokens": 0, "echo": True}, "prompt", "need 129, have 128"),
    (C, {"prompt": "x", "echo": True, "max_tokens": 0, "min_tokens": 2}, "min_tokens", "min_token"),
    (C, {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs", "21"),
    (C, {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs", "-1"),
    (C, {"prompt": "x", "prompt_logprobs": True}, "prompt_logprobs", "integer"),
    (C, {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streams"),
    (CHAT, {"messages": HELLO, "prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "streams"),
    (C, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
    (C, {"prompt": "x", "temprature": 1}, "temprature", "did you mean temperature?"),
    (C, {"prompt": "x", "messages": HELLO}, "messages", "/v1/chat/completions"),
    (C, {"prompt": "x", "see\ud800d": 1}, "see d", "did you mean seed?"),
    (C, {"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
    (C, {"prompt": "x", "best_of": 2}, "best_of", "best_of is 2 and n is 1"),
    (C, {"prompt": "x", "best_of": 2, "n": 3}, "best_of", "best_of is 2 and n is 3"),
    (C, {"prompt": "x", "best_of": True}, "best_of", "integer"),
    (CHAT, {"messages": HELLO, "best_of": 2}, "best_of", "say n"),
    (C, {"prompt": "x", "n": 0}, "n", "n is 0; it must be from 1 to 64"),
    (C, {"prompt": "x", "n": 1000}, "n", "n is 1000; it must be from 1 to 64"),
    (C, {"prompt": ["x"] * 64, "n": 3}, "n", "192 answers; at most 128"),
    (C, {"prompt": "x", "n": True}, "n", "integer"),
    (C, {"prompt": "x", "n": "2"}, "n", "integer"),
    (CHAT, {"messages": HELLO, "n": 0}, "n", "n is 0"),
    (CHAT, {"messages": HELLO, "n": 1000}, "n", "n is 1000"),
    (C, {"prompt": "x", "presence_penalty": 3.0}, "presence_penalty", "3.0"),
    (C, {"prompt": "x", "frequency_penalty": 3.0}, "frequency_penalty", "3.0"),
    (C, {"prompt": "x", "frequency_penalty": "a"}, "frequency_penalty", "'a'"),
    (C, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "above 0"),
    (CHAT, {"messages": HELLO, "presence_penalty": -2.5}, "presence_penalty", "-2.5"),
    (C, {"prompt": "x", "priority": "x"}, "priority", "integer"),
    (C, {"prompt": "x", "priority": 1.5}, "priority", "integer"),
    (C, {"prompt": "x", "priority": 2**31}, "priority", "priority is 2147483648"),
    (C, {"prompt": "x", "cache_salt": "a" * 10_000}, "cache_salt", "10000 characters; at most 256"),
    (C, {"prompt": "x", "cache_salt": 5}, "cache_salt", "string"),
    (CHAT, {"messages": HELLO, "cache_salt": "\ud800"}, "cache_salt", "not text"),
    (
        C,
        {"prompt": "x", "stream": True, "stream_options": {"includeusage": True}},
        "stream_options.includeusage",
        "did you mean include_usage?",
    ),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, "messages", "list"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "messages[0]"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "id"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "text"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "\udc00"}]},
        "messages[0].content",
        "not text",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x", "nam": 1}]},
        "messages[0].nam",
        "unknown",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
        "image_url",
    ),
    (CHAT, {"messages": [*HELLO, {"role": "system", "content": "x"}]}, "messages", "come first"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function", "a name"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice", "has no tools"),
    (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "xml"}},
        "response_format",
        "'xml'",
    ),
    (CHAT, {"messages": HELLO, "chat_template": "{{ x }}"}, "chat_template", "not supported"),
    (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"a": 1}},
        "chat_template_kwargs",
        "does not read 'a'",
    ),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs true"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": -3}, "max_completion_tokens", "-3"),
    (
        CHAT,
        {"messages": HELLO, "max_completion_tokens": 3, "min_tokens": 5},
        "min_tokens",
        "min_tokens is 5, above max_completion_tokens 3",
    ),
    (CHAT, {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, None, "send one"),
    (CHAT, {"messages": [{"role": "user", "content": "q" * 4097}]}, None, "characters"),
    ("/tokenize", {}, "prompt", "either"),
    ("/detokenize", {"tokens": [99999]}, "tokens", "outside the vocabulary"),
]


def test_bad_fields(served: Running) -> None:
    import json

    for path, body, param, part in FIELDS:
        text = json.dumps(body)  # also lone surrogates, as \\ud800
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(
            served.url + path, content=text, headers=headers, timeout=20, verify=False
        )
        shown = text[:100]
        assert reply.status_code == 400, (shown, reply.text)
        error = error_of(reply, 400)
        assert part in error["message"], (shown, error)
        assert error["type"] == "invalid_request_error"
        if param is not None:
            assert error["param"] == param, (shown, error)
    assert served.engine.seen == []


def test_prompt_too_long_has_the_code(served: Running) -> None:
    for body in ({"prompt": [5] * 129}, {"prompt": "q" * 5000}):
        error = error_of(served.post(C, body), 400)
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "JSON object"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x",}', "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'"text"', "JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "x", "metadata": {"a": NaN}}', "NaN"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "x", "model": "a", "model": "b"}', 'key "model" is given twice'),
        (b'{"prompt": "x", "metadata": {"a\\u0062": 1, "ab": 2}}', 'key "ab" is given twice'),
    ],
)
def test_malformed_bodies(served: Running, content: bytes, part: str) -> None:
    headers = {"Content-Type": "application/json"}
    for path in (C, CHAT, "/tokenize"):
        reply = httpx.post(
            served.url + path, content=content, headers=headers, timeout=20, verify=False
        )
        if path == C or part != "temperature":
            assert part in error_of(reply, 400)["message"]


def test_a_repeated_key_is_named(served: Running) -> None:
    """Python's reader would keep the last of them, another reader the first."""
    headers = {"Content-Type": "application/json"}
    for path, content, key in (
        (C, '{"prompt": "x", "max_tokens": 1, "max_tokens": 100}', "max_tokens"),
        (C, '{"prompt": "x", "logit_bias": {"5": 1, "5": -100}}', "5"),
        (CHAT, '{"messages": [{"role": "user", "role": "system", "content": "x"}]}', "role"),
        ("/tokenize", '{"prompt": "x", "prompt": "y"}', "prompt"),
        ("/detokenize", '{"tokens": [5], "tokens": [6]}', "tokens"),
        (C, '{"prompt": "x", "\\ud800": 1, "\\ud800": 2}', " "),
        (C, '{"prompt": "x", "' + "k" * 500 + '": 1, "' + "k" * 500 + '": 1}', "k" * 100),
    ):
        reply = httpx.post(
            served.url + path, content=content, headers=headers, timeout=20, verify=False
        )
        error = error_of(reply, 400)
        assert error["param"] == key and error["code"] == "invalid_json"
        assert "is given twice" in error["message"] and len(error["message"]) < 200
    assert served.engine.seen == []


def test_other_content_type(served: Running) -> None:
    reply = httpx.post(
        served.url + C,
        content=b'{"prompt": "x"}',
        headers={"Content-Type": "text/plain"},
        verify=False,
    )
    assert "application/json" in error_of(reply, 415)["message"]


def test_unknown_model(served: Running) -> None:
    error = error_of(served.post(C, {"prompt": "x", "model": "gpt-5"}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert "fake-model" in error["message"]
    error_of(served.get("/v1/models/gpt-5"), 404)
    with pytest.raises(openai.NotFoundError):
        served.client().chat.completions.create(model="gpt-5", messages=HELLO)  # type: ignore[arg-type]


def test_unknown_route_and_method(served: Running) -> None:
    error_of(served.get("/v2/nothing"), 404)
    reply = served.get(C)
    error_of(reply, 405)
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_engine(served: Running, stream: bool) -> None:
    body = {"prompt": "x", "stream": stream}
    served.engine.refuse = CapacityError("the prompt cannot fit", need=900, have=800, largest=700)
    error = error_of(served.post(C, body), 400)
    assert error["code"] == "kv_capacity_exceeded"
    assert all(number in error["message"] for number in ("900", "800", "700"))

    for asked, param in (
        ({}, "max_tokens"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"max_tokens": 2}, "max_tokens"),
    ):
        assert error_of(served.post(C, body | asked), 400)["param"] == param

    served.engine.refuse = RequestError("seed is odd", "seed")
    assert error_of(served.post(C, body), 400)["param"] == "seed"

    served.engine.refuse = QueueFullError("the queue has 8 requests, its bound; try again later")
    reply = served.post(C, body)
    assert "8 requests" in error_of(reply, 429)["message"]
    assert int(reply.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        served.client().completions.create(model="fake-model", prompt="x", stream=stream)

    served.engine.refuse = EngineDeadError("worker 2 at 10.0.0.7 was killed")
    error = error_of(served.post(C, body), 503)
    assert "10.0.0.7" not in error["message"]

    for unexpected in (ZeroDivisionError("secret"), CommError("secret of rank 3")):
        served.engine.refuse = unexpected
        reply = served.post(C, body)
        error = error_of(reply, 500)
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] in error["message"]
    served.engine.refuse = None
    assert served.post(C, body).status_code == 200


def test_one_refusal_of_many_prompts_aborts_the_others(served: Running) -> None:
    served.engine.delay_s = 0.05
    served.engine.break_after = (1, CapacityError("no room", need=3, have=2, largest=1))
    error_of(served.post(C, {"prompt": [[5], [6]], "max_tokens": 50}), 400)
    assert not served.engine.live


def test_failure_in_the_middle(served: Running) -> None:
    served.engine.break_after = (2, RuntimeError("secret"))
    reply = served.post(C, {"prompt": "x"})
    assert "secret" not in reply.text
    error_of(reply, 500)
    text = served.post(C, {"prompt": "x", "stream": True}).text
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and '"error"' in events[-2] and "secret" not in text
    assert len(events) == 4
    with pytest.raises(openai.APIError, match="internal error"):
        list(served.client().completions.create(model="fake-model", prompt="x", stream=True))


def test_engine_says_error_or_abort(served: Running) -> None:
    served.engine.end = "error"
    assert error_of(served.post(C, {"prompt": "x"}), 500)["code"] == "engine_error"
    chat = {"messages": HELLO, "max_tokens": 3}
    assert error_of(served.post(CHAT, chat), 500)["code"] == "engine_error"
    text = served.post(CHAT, chat | {"stream": True}).text
    assert '"engine_error"' in text and text.endswith("data: [DONE]\n\n")
    served.engine.end = "abort"
    assert served.post(CHAT, chat).json()["choices"][0]["finish_reason"] == "abort"


def test_slow_tokenizer_has_a_deadline(launch: Any, tokenizer: Any) -> None:
    class Slow:
        chat_template = "x"
        go_on = threading.Event()

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            self.go_on.wait(2 * PATIENCE_S)
            return {"input_ids": [5]}

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            self.go_on.wait(2 * PATIENCE_S)
            return "x"

    server = launch(tokenize_timeout_s=0.2)
    server.engine.tokenizer = Slow()
    try:
        for path, body in ((C, {"prompt": "x"}), (CHAT, {"messages": HELLO})):
            assert error_of(server.post(path, body), 503)["code"] == "tokenize_timeout"
    finally:
        Slow.go_on.set()
    assert server.get("/health").status_code == 200
