"""/v1/completions and /v1/chat/completions through the openai client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from ds_cp.sampling_params import RequestOptions, SamplingParams
from tests.helpers.fake_engine import FakeEngine, expected_ids, make_tokenizer
from tests.server.conftest import Running, answer_text

MODEL = "fake-model"


def test_completion_of_text(served: Running, tokenizer: Any) -> None:
    reply = served.client().completions.create(model=MODEL, prompt="the quick", max_tokens=5)
    ids = tokenizer("the quick")["input_ids"]
    assert reply.id.startswith("cmpl-")
    assert reply.object == "text_completion"
    assert reply.choices[0].text == answer_text(served.engine, ids, 5)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(ids),
        "completion_tokens": 5,
        "total_tokens": len(ids) + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert served.engine.seen == [(ids, SamplingParams(max_tokens=5))]


def test_completion_default_is_16_tokens_or_what_fits(served: Running) -> None:
    client = served.client()
    first = client.completions.create(model=MODEL, prompt=[5, 6])
    assert first.usage is not None and first.usage.completion_tokens == 16
    second = client.completions.create(model=MODEL, prompt=[5] * 120)
    assert second.usage is not None and second.usage.completion_tokens == 8


@pytest.mark.parametrize(
    "prompt",
    [["one two", "three"], [5, 6, 7], [[5, 6], [7], [8, 9]]],
    ids=["strings", "ids", "lists of ids"],
)
def test_every_spelling_of_prompt(served: Running, tokenizer: Any, prompt: Any) -> None:
    lists = prompt if isinstance(prompt[0], list) else [prompt]
    if isinstance(prompt[0], str):
        lists = [tokenizer(text)["input_ids"] for text in prompt]
    reply = served.client().completions.create(model=MODEL, prompt=prompt, max_tokens=3)
    assert [c.index for c in reply.choices] == list(range(len(lists)))
    assert [c.text for c in reply.choices] == [answer_text(served.engine, x, 3) for x in lists]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, lists))
    assert reply.usage.completion_tokens == 3 * len(lists)


def test_completion_stream_says_the_same(served: Running) -> None:
    prompts = [[5, 6], [7]]
    stream = served.client().completions.create(
        model=MODEL,
        prompt=prompts,
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == [answer_text(served.engine, ids, 6) for ids in prompts]
    assert reasons == {0: "length", 1: "length"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 3 + 12
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_usage_in_every_chunk(served: Running, chat: bool) -> None:
    """vLLM's ``continuous_usage_stats``, by which load generators count tokens as they come."""
    client = served.client()
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = (
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=4,
            stream=True,
            stream_options=options,
        )
        if chat
        else client.completions.create(
            model=MODEL, prompt=[5, 6], max_tokens=4, stream=True, stream_options=options
        )
    )
    usages = [chunk.usage for chunk in stream]
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts) and set(counts) >= {1, 2, 3, 4}
    assert usages[-1] == usages[-2] and counts[0] == (0 if chat else 1)
    assert all(one.total_tokens == one.prompt_tokens + one.completion_tokens for one in usages)
    alone = {"prompt": [5], "stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert '"usage"' not in served.post("/v1/completions", alone).text


def test_stream_framing(served: Running) -> None:
    body = {"prompt": [5, 6], "max_tokens": 2, "stream": True}
    reply = served.post("/v1/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(e.removeprefix("data: ")) for e in events[:-2])
    assert len(events) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_echo(served: Running, tokenizer: Any, stream: bool) -> None:
    for prompt in ("the quick", tokenizer("the quick")["input_ids"]):
        reply = served.client().completions.create(
            model=MODEL, prompt=prompt, max_tokens=2, echo=True, stream=stream
        )
        chunks = list(reply) if stream else [reply]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        ids = tokenizer("the quick")["input_ids"]
        assert text == "the quick" + answer_text(served.engine, ids, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(served: Running, tokenizer: Any, stream: bool) -> None:
    reply = served.client().completions.create(
        model=MODEL, prompt=[5, 6], max_tokens=3, logprobs=2, stream=stream
    )
    blocks = [c.choices[0].logprobs for c in (reply if stream else [reply])]
    tokens = [t for b in blocks for t in b.tokens]
    pieces = [tokenizer.decode([i]) for i in expected_ids([5, 6], 3, len(tokenizer))]
    assert tokens == pieces
    assert [x for b in blocks for x in b.token_logprobs] == [-0.5] * 3
    assert [x for b in blocks for x in b.text_offset] == [
        sum(map(len, pieces[:n])) for n in range(3)
    ]
    for piece, top in zip(pieces, [t for b in blocks for t in b.top_logprobs], strict=True):
        assert top == {"<|end|>": -1.0, "<|system|>": -2.0, piece: -0.5}


def test_chat_equals_the_template(served: Running, tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "be short"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        },
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    plain = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    ids = tokenizer.apply_chat_template(plain, tokenize=True, add_generation_prompt=True)
    ids = list(ids["input_ids"])
    reply = served.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion"
    assert served.engine.seen[0][0] == ids
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == answer_text(served.engine, ids, 4)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None and reply.usage.prompt_tokens == len(ids)


def test_chat_stream(served: Running) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "one two"}],
        "max_completion_tokens": 7,
    }
    client = served.client()
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [
        "length"
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_chat_default_is_what_fits(served: Running) -> None:
    reply = served.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}]
    )
    assert served.engine.seen[0][1].max_tokens is None
    assert reply.usage is not None and reply.usage.total_tokens == 128


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(served: Running, tokenizer: Any, stream: bool) -> None:
    reply = served.client().chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    choices = [c.choices[0] for c in (reply if stream else [reply])]
    entries = [e for c in choices if c.logprobs for e in c.logprobs.content or []]
    ids = expected_ids(served.engine.seen[0][0], 3, len(tokenizer))
    assert [e.token for e in entries] == [tokenizer.decode([i]) for i in ids]
    assert [bytes(e.bytes).decode(errors="replace") for e in entries] == [e.token for e in entries]
    assert [[(t.token, t.logprob) for t in e.top_logprobs] for e in entries] == [
        [("<|end|>", -1.0), ("<|system|>", -2.0)]
    ] * 3


def test_every_sampling_field_reaches_the_engine(served: Running) -> None:
    body = {
        "prompt": [5],
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "n": 2,
        "seed": 7,
        "stop": ["zzz", "yyy"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logit_bias": {"17": -3, "18": 2.5},
        "skip_special_tokens": False,
        "logprobs": 1,
        "prompt_logprobs": 3,
        "priority": -4,
    }
    assert served.post("/v1/completions", body).status_code == 200
    assert served.engine.seen[0][1] == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=-1,
        repetition_penalty=1.2,
        n=2,
        seed=7,
        stop=("zzz", "yyy"),
        stop_token_ids=(9,),
        ignore_eos=True,
        logit_bias={17: -3, 18: 2.5},
        skip_special_tokens=False,
        logprobs=1,
        prompt_logprobs=3,
    )
    assert served.engine.options[0] == RequestOptions(priority=-4)


def test_null_means_the_default(served: Running) -> None:
    names = (
        "max_tokens min_tokens temperature top_p top_k min_p seed stop stop_token_ids ignore_eos "
        "presence_penalty frequency_penalty repetition_penalty n best_of prompt_logprobs priority "
        "cache_salt"
    )
    nulls = dict.fromkeys(f"{names} logit_bias logprobs echo stream stream_options model".split())
    reply = served.post("/v1/completions", {"prompt": [5]} | nulls)
    assert reply.status_code == 200, reply.text
    assert served.engine.seen[0][1] == SamplingParams(max_tokens=16)
    assert served.engine.options[0] == RequestOptions()


def test_stop_string(served: Running, tokenizer: Any) -> None:
    third = tokenizer.decode([expected_ids([5], 3, len(tokenizer))[2]])
    reply = served.post("/v1/completions", {"prompt": [5], "stop": third}).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["stop_reason"] == third
    assert reply["choices"][0]["text"] == answer_text(served.engine, [5], 2)


def test_harmless_fields_are_accepted(served: Running) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi", "name": None, "tool_calls": []}],
        "max_tokens": 1,
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "verbosity": "low",
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
    }
    assert served.post("/v1/chat/completions", body).status_code == 200


def test_many_requests_at_once(served: Running) -> None:
    served.engine.delay_s = 0.002
    client = served.client()

    def ask(number: int) -> tuple[str, str]:
        prompt = [5 + number % 90, number]
        if number % 2:
            reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20)
            return reply.choices[0].text, answer_text(served.engine, prompt, 20)
        stream = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, stream=True)
        text = "".join(c.choices[0].text for c in stream)
        return text, answer_text(served.engine, prompt, 20)

    with ThreadPoolExecutor(16) as pool:
        for got, expected in pool.map(ask, range(64)):
            assert got == expected
    assert served.engine.aborted == [] and not served.engine.live


def test_model_without_template(launch: Any) -> None:
    server = launch(FakeEngine(make_tokenizer(chat_template=None)))
    with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
        server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}]
        )
    assert server.client().completions.create(model=MODEL, prompt="hi").choices


def test_partial_characters_in_logprobs(served: Running, tokenizer: Any) -> None:
    """A token that is one byte of a longer character: its byte in chat, a label in completions."""
    from ds_cp.api.answers.logprobs import TokenTexts

    texts = TokenTexts(served.engine)
    ids = tokenizer("\u20ac")["input_ids"]
    assert len(ids) == 3
    assert b"".join(texts.piece(i)[1] for i in ids) == "\u20ac".encode()
    assert [texts.label(i) for i in ids] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]


def test_keep_alive_while_no_token_is_ready(launch: Any) -> None:
    server = launch(keep_alive_s=0.1)
    server.engine.first_delay_s = 1.6  # longer than the wait for a refusal
    body = {"prompt": [5], "max_tokens": 1, "stream": True}
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=body, timeout=20, verify=False
    ) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[0] == ": keep-alive"
    assert lines.count(": keep-alive") >= 3
    assert lines[-1] == "data: [DONE]"
    stream = server.client().completions.create(model=MODEL, prompt=[5], max_tokens=1, stream=True)
    assert [c.choices[0].finish_reason for c in stream] == ["length"]
