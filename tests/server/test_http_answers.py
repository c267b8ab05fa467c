"""Several answers per prompt, log-probabilities of the prompt, cached tokens, cache salts."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from ds_cp.api import context
from ds_cp.api.answers import logprobs
from tests.helpers.fake_engine import FakeEngine, expected_ids, prompt_scores
from tests.server.conftest import Running, answer_text, error_of, wait_for

MODEL = "fake-model"
C = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]


def events_of(reply: httpx.Response) -> list[Any]:
    events = [e.removeprefix("data: ") for e in reply.text.split("\n\n") if e.startswith("data")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


# -- n -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_n_of_several_prompts(served: Running, stream: bool) -> None:
    prompts = [[5, 6], [7], [8]]
    served.engine.short = {1: 2}
    reply = served.client().completions.create(
        model=MODEL, prompt=prompts, n=3, best_of=3, max_tokens=5, stream=stream
    )
    texts, reasons = [""] * 9, [""] * 9
    for chunk in reply if stream else [reply]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert not reasons[choice.index], "text after the end of an answer"
            reasons[choice.index] = choice.finish_reason or ""
    assert texts == [
        answer_text(served.engine, prompt, 2 if index == 1 else 5, index)
        for prompt in prompts
        for index in range(3)
    ]
    assert reasons == ["length", "stop", "length"] * 3
    assert [(ids, params.n) for ids, params in served.engine.seen] == [(p, 3) for p in prompts]
    if not stream:
        assert [choice.index for choice in reply.choices] == list(range(9))
        assert reply.usage.prompt_tokens == 4 and reply.usage.completion_tokens == 3 * (5 + 2 + 5)
    assert served.engine.aborted == [] and not served.engine.live


@pytest.mark.parametrize("stream", [False, True])
def test_n_in_chat(served: Running, stream: bool) -> None:
    served.engine.short = {0: 1}
    served.engine.backwards = True
    reply = served.client().chat.completions.create(
        model=MODEL,
        messages=HELLO,
        n=3,
        max_tokens=4,
        stream=stream,
        logprobs=True,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    texts, reasons, roles, tokens = [""] * 3, [""] * 3, [""] * 3, [0] * 3
    usage = None
    for chunk in reply if stream else [reply]:
        usage = chunk.usage
        for choice in chunk.choices:
            part = choice.delta if stream else choice.message
            texts[choice.index] += part.content or ""
            roles[choice.index] += part.role or ""
            reasons[choice.index] += choice.finish_reason or ""
            tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    ids = served.engine.seen[0][0]
    assert texts == [answer_text(served.engine, ids, 1 if i == 0 else 4, i) for i in range(3)]
    assert roles == ["assistant"] * 3 and reasons == ["stop", "length", "length"]
    assert tokens == [1, 4, 4]
    assert usage is not None and usage.completion_tokens == 9
    assert usage.prompt_tokens == len(ids) and len(served.engine.seen) == 1


def test_leaving_after_one_of_the_answers_ended_aborts(served: Running) -> None:
    served.engine.delay_s = 0.05
    served.engine.short = {0: 1}
    stream = served.client().completions.create(
        model=MODEL, prompt=[5], n=2, max_tokens=100, stream=True
    )
    chunks = iter(stream)
    while next(chunks).choices[0].finish_reason != "stop":
        pass
    assert served.engine.aborted == []
    stream.close()
    assert wait_for(lambda: not served.engine.live)
    assert len(served.engine.aborted) == 1


def test_an_engine_that_ends_before_every_answer_did(served: Running) -> None:
    class Forgetful(FakeEngine):
        async def generate(self, *args: Any) -> Any:
            async for delta in super().generate(*args):
                yield delta
                if delta.index == 0 and delta.finish_reason:
                    return

    served.engine.__class__ = Forgetful
    assert served.post(C, {"prompt": [5], "max_tokens": 2}).status_code == 200
    reply = served.post(C, {"prompt": [5], "max_tokens": 2, "n": 2})
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_dead"


def test_what_waits_for_a_slow_reader_is_charged(launch: Any, tokenizer: Any) -> None:
    """A stream without max_tokens grows beyond the budget: it runs on, others are refused."""
    taken = [0]

    class Counting(FakeEngine):
        async def generate(self, *args: Any) -> Any:
            async for delta in super().generate(*args):
                taken[0] += 1
                yield delta

    engine = Counting(tokenizer, max_model_len=200_000)
    engine.info = replace(engine.info, largest_request_tokens=200_000)
    server = launch(engine, write_timeout_s=60.0, max_buffered_bytes="16MiB")
    ask = {"messages": [{"role": "user", "content": "x"}]}
    body = ask | {"n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}
    count = 8 * (1_000_000 // (8 * 21))  # as many as log-probabilities are allowed
    with httpx.stream("POST", server.url + CHAT, json=body, timeout=30, verify=False) as reply:
        assert reply.status_code == 200
        assert wait_for(lambda: taken[0] == count, 20)
        refused = server.post(CHAT, ask | {"max_tokens": 1})
        assert error_of(refused, 503)["code"] == "server_busy"
        assert engine.aborted == []
    assert wait_for(lambda: server.post(CHAT, ask | {"max_tokens": 1}).status_code == 200)


# -- log-probabilities of the prompt -------------------------------------------------------------


def scored(reply: Any, stream: bool, choices: int = 1) -> tuple[list[str], list[dict[str, Any]]]:
    """Text and joined logprobs of every choice."""
    texts: list[str] = [""] * choices
    blocks: list[dict[str, Any]] = [{} for _ in range(choices)]
    for chunk in reply if stream else [reply]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for key, values in choice.logprobs.model_dump().items():
                blocks[choice.index][key] = blocks[choice.index].get(key, []) + values
    return texts, blocks


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("piece", [2, 1024])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(
    served: Running, tokenizer: Any, monkeypatch: Any, stream: bool, piece: int, as_ids: bool
) -> None:
    monkeypatch.setattr(logprobs, "PIECE", piece)
    text = "the quick brown \u20ac two"
    ids = tokenizer(text)["input_ids"]
    reply = served.client().completions.create(
        model=MODEL,
        prompt=ids if as_ids else text,
        max_tokens=3,
        echo=True,
        logprobs=2,
        stream=stream,
    )
    (got,), (block,) = scored(reply, stream)
    new = expected_ids(ids, 3, len(tokenizer))
    pieces = [tokenizer.decode([i]) for i in new]
    assert got == text + "".join(pieces)
    shown = [tokenizer.decode([i]) for i in ids]
    euro = [n for n, piece_ in enumerate(shown) if piece_ == "\ufffd"]
    assert len(euro) == 3
    for n, label in zip(euro, ("bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"), strict=True):
        shown[n] = label
    assert block["tokens"] == shown + pieces
    assert block["token_logprobs"] == [None] + [-0.25 * n for n in range(1, len(ids))] + [-0.5] * 3
    assert block["top_logprobs"][0] is None
    assert block["top_logprobs"][1] == {shown[1]: -0.25, "<|end|>": -50.0}
    assert block["top_logprobs"][-1] == {"<|end|>": -1.0, "<|system|>": -2.0, pieces[-1]: -0.5}
    offsets = [*block["text_offset"], len(got)]
    assert len(offsets) == len(ids) + 4
    for n, token in enumerate(shown + pieces):
        if n not in euro:
            assert got[offsets[n] : offsets[n + 1]] == token
    assert got[offsets[euro[0]] : offsets[euro[-1] + 1]] == "\u20ac"
    params = served.engine.seen[0][1]
    assert params.logprobs == 2 and params.prompt_logprobs == 2


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_prompt_as_harnesses_do(served: Running, tokenizer: Any, stream: bool) -> None:
    """``max_tokens`` 0 with ``echo``: the prompt alone, and no new token in text or usage."""
    prompts = [tokenizer("one two three")["input_ids"], [9, 10]]
    served.engine.end = "stop"
    reply = served.client().completions.create(
        model=MODEL,
        prompt=prompts,
        max_tokens=0,
        echo=True,
        logprobs=1,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    chunks = list(reply) if stream else [reply]
    texts, blocks = scored(chunks, True, 2)
    assert texts == [tokenizer.decode(ids) for ids in prompts]
    for ids, block in zip(prompts, blocks, strict=True):
        assert block["token_logprobs"] == [None] + [-0.25 * n for n in range(1, len(ids))]
        assert len(block["text_offset"]) == len(block["tokens"]) == len(ids)
    ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert ends == ["length", "length"]
    assert chunks[-1].usage.completion_tokens == 0
    assert chunks[-1].usage.total_tokens == sum(map(len, prompts))
    assert [params.max_tokens for _, params in served.engine.seen] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_without_new_tokens(served: Running, stream: bool) -> None:
    reply = served.client().completions.create(
        model=MODEL, prompt="one two", max_tokens=0, echo=True, stream=stream
    )
    chunks = list(reply) if stream else [reply]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.choices[0].logprobs is None for chunk in chunks)
    assert served.engine.seen[0][1].prompt_logprobs is None


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_begins_with_the_prompt(
    served: Running, tokenizer: Any, stream: bool, backwards: bool
) -> None:
    """Also when another answer's tokens come before those of index 0, which bring the scores."""
    served.engine.backwards = backwards
    served.engine.short = {1: 1}
    prompts = [tokenizer("one two")["input_ids"], tokenizer("jumps")["input_ids"]]
    reply = served.client().completions.create(
        model=MODEL, prompt=prompts, n=2, max_tokens=2, echo=True, logprobs=0, stream=stream
    )
    texts, blocks = scored(reply, stream, 4)
    for number, (text, block) in enumerate(zip(texts, blocks, strict=True)):
        ids, index = prompts[number // 2], number % 2
        count = 1 if index else 2
        assert text == tokenizer.decode(ids) + answer_text(served.engine, ids, count, index)
        assert "".join(block["tokens"]) == text
        assert block["token_logprobs"][0] is None and len(block["tokens"]) == len(ids) + count


def test_prompt_logprobs_as_vllm_has_them(served: Running, tokenizer: Any) -> None:
    ids = tokenizer("one two three")["input_ids"]
    reply = served.client().completions.create(
        model=MODEL, prompt=[ids, [9]], n=2, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    for choice, prompt in zip(reply.choices, (ids, ids, [9], [9]), strict=True):
        got = choice.model_dump()["prompt_logprobs"]
        assert got[0] is None and len(got) == len(prompt)
        for n, token_id in enumerate(prompt[1:], 1):
            own, other = {"logprob": -0.25 * n, "rank": 1}, {"logprob": -50.0, "rank": 2}
            assert got[n] == {
                str(token_id): own | {"decoded_token": tokenizer.decode([token_id])},
                "0": other | {"decoded_token": "<|end|>"},
            }
    plain = served.client().completions.create(model=MODEL, prompt=ids, max_tokens=1)
    assert "prompt_logprobs" not in plain.choices[0].model_dump()

    chat = served.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    got = chat.model_dump()["prompt_logprobs"]
    prompt = served.engine.seen[-1][0]
    assert got[0] is None and [list(entry) for entry in got[1:]] == [[str(i)] for i in prompt[1:]]
    assert [entry[str(i)]["rank"] for i, entry in zip(prompt[1:], got[1:], strict=True)] == [
        None
    ] * (len(prompt) - 1)


def test_prompt_logprobs_and_echo_have_their_own_numbers(served: Running) -> None:
    body = {"prompt": [9, 10], "echo": True, "logprobs": 1, "prompt_logprobs": 3, "max_tokens": 1}
    choice = served.post(C, body).json()["choices"][0]
    assert served.engine.seen[0][1].prompt_logprobs == 3
    assert len(choice["logprobs"]["top_logprobs"][1]) == 1
    assert len(choice["prompt_logprobs"][1]) == 3


def test_an_engine_without_the_scores_is_an_error(served: Running) -> None:
    served.engine._with_prompt = lambda delta, *_: delta  # type: ignore[method-assign]
    echo = {"prompt": [9, 10], "echo": True, "logprobs": 1}
    for path, body in (
        (C, echo),
        (C, {"prompt": [9, 10], "prompt_logprobs": 1}),
        (CHAT, {"messages": HELLO, "prompt_logprobs": 1}),
    ):
        reply = served.post(path, body)
        assert reply.status_code == 500 and reply.json()["error"]["code"] == "engine_error"
    assert events_of(served.post(C, echo | {"stream": True}))[-1]["error"]["code"] == "engine_error"


def test_bound_on_log_probabilities(served: Running, monkeypatch: Any) -> None:
    """Those of the prompts and of the new tokens are counted together, for every choice."""
    monkeypatch.setattr(context, "MAX_LOGPROBS", 84)
    body = {"prompt": [[5] * 6, [5] * 4], "logprobs": 2, "echo": True, "n": 2}  # 60, and 12 a token
    assert served.post(C, body | {"max_tokens": 2}).status_code == 200
    error = served.post(C, body | {"max_tokens": 3}).json()["error"]
    assert error["param"] == "max_tokens" and "are 96 entries; at most 84" in error["message"]
    assert "10 prompt tokens in 2 choices and of up to 12 new tokens" in error["message"]
    error = served.post(C, body | {"max_tokens": 1, "logprobs": 4}).json()["error"]
    assert error["param"] == "prompt" and "are 120 entries" in error["message"]
    assert served.post(C, {"prompt": [5], "logprobs": 20, "max_tokens": 4}).status_code == 200
    assert served.post(C, {"prompt": [5], "logprobs": 20, "max_tokens": 5}).status_code == 400
    chat = {"messages": HELLO * 9, "prompt_logprobs": 20, "max_tokens": 1}
    assert served.post(CHAT, chat).json()["error"]["param"] == "messages"
    assert len(served.engine.seen) == 3


def test_bound_on_the_log_probabilities_of_what_fits(served: Running, monkeypatch: Any) -> None:
    """Without max_tokens, a chat gets as many tokens as fit, in this bound too."""
    chat = {"messages": HELLO, "logprobs": True, "top_logprobs": 4}
    assert served.post(CHAT, chat).status_code == 200
    room = served.engine.info.max_model_len - len(served.engine.seen[0][0])
    monkeypatch.setattr(context, "MAX_LOGPROBS", 5 * room - 1)
    [choice] = served.post(CHAT, chat).json()["choices"]
    assert len(choice["logprobs"]["content"]) == room - 1 and choice["finish_reason"] == "length"
    error = served.post(CHAT, chat | {"max_tokens": room}).json()["error"]
    assert error["param"] == "max_tokens" and "lower max_tokens" in error["message"]
    assert served.post(CHAT, chat | {"max_tokens": room - 1}).status_code == 200
    monkeypatch.setattr(context, "MAX_LOGPROBS", 4)  # not one token
    assert served.post(CHAT, chat).json()["error"]["param"] == "max_tokens"


def test_long_scored_prompts_do_not_hold_up_others(launch: Any, tokenizer: Any) -> None:
    """While one answer of 300,000 entries is built, /health is answered soon, again and again."""
    from concurrent.futures import ThreadPoolExecutor

    server = launch(FakeEngine(tokenizer, max_model_len=200_000))
    prompt = (tokenizer("the quick brown fox")["input_ids"] * 60_000)[:100_000]
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 1, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        reply = pool.submit(server.post, C, body)
        longest = 0.0
        while not reply.done():
            begun = time.monotonic()
            assert server.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - begun)
            time.sleep(0.01)
        took = time.monotonic() - started
    count = sum(len(e["choices"][0]["logprobs"]["tokens"]) for e in events_of(reply.result()))
    assert count == 100_001
    assert longest < max(3.0, took / 3)  # on a busy machine all takes longer


def test_scores_of_the_fake_engine() -> None:
    scores = prompt_scores([7, 8], 1)
    assert scores[0] is None and scores[1] is not None and scores[1].top == ((8, -0.25),)


# -- usage, priority, salts ------------------------------------------------------------------------


def test_cached_tokens(served: Running) -> None:
    client = served.client()
    served.engine.cached = 3
    reply = client.completions.create(model=MODEL, prompt=[[5] * 4, [6] * 5], n=2, max_tokens=1)
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 6
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, n=2, max_tokens=2)
    assert chat.usage is not None and chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 3
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 1}
    last = list(client.completions.create(model=MODEL, prompt=[[5] * 4, [6] * 5], **options))[-1]
    assert last.usage.prompt_tokens_details.cached_tokens == 6
    last = list(client.chat.completions.create(model=MODEL, messages=HELLO, **options))[-1]
    assert last.usage.prompt_tokens_details.cached_tokens == 3


def test_priority_and_salt_reach_the_engine(served: Running) -> None:
    client = served.client()
    extra = {"priority": 7, "cache_salt": "tenant \u20ac"}
    client.completions.create(model=MODEL, prompt=[5], extra_body=extra)
    client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1, extra_body=extra)
    client.completions.create(model=MODEL, prompt=[5])
    first, second, third = served.engine.options
    assert first == second and first.priority == 7
    assert len(first.cache_salt) == 64 and "tenant" not in first.cache_salt
    assert third.priority == 0 and third.cache_salt == ""  # the key is not asked for here


def test_salts_differ_by_key_and_by_salt(launch: Any) -> None:
    server = launch(api_key=("key-a", "key-ab"))
    salts: dict[tuple[str, str | None], str] = {}
    for key in ("key-a", "key-ab"):
        for salt in (None, "c", "bc", "c" * 256):
            extra = {} if salt is None else {"cache_salt": salt}
            for _ in range(2):
                server.client(key).completions.create(model=MODEL, prompt=[5], extra_body=extra)
            first, again = (options.cache_salt for options in server.engine.options[-2:])
            assert first == again
            salts[key, salt] = first
    assert len(set(salts.values())) == 8 and "" not in salts.values()
    assert all(len(salt) == 64 and int(salt, 16) for salt in salts.values())
    with pytest.raises(openai.AuthenticationError):
        server.client("key-x").completions.create(model=MODEL, prompt=[5])
    assert len(server.engine.options) == 16


def test_who_shares_the_engine_is_a_key_or_an_address(launch: Any, served: Running) -> None:
    """On every route: the same key is the same client, whatever its salt or connection."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": [5], "max_tokens": 1},
        "/v1/chat/completions": {"messages": HELLO, "max_tokens": 1, "cache_salt": "mine"},
        "/v1/responses": {"input": "hello", "max_output_tokens": 1},
        "/v1/messages": {"messages": HELLO, "max_tokens": 1},
    }
    server = launch(api_key=("key-a", "key-b"))
    found: dict[str, set[str]] = {}
    for key in ("key-a", "key-b"):
        for path, body in bodies.items():
            headers = {"Authorization": f"Bearer {key}"}
            reply = httpx.post(server.url + path, json=body | {"model": MODEL}, headers=headers)
            assert reply.status_code == 200, reply.text
            found.setdefault(key, set()).add(server.engine.options[-1].client)
    assert all(len(clients) == 1 for clients in found.values())
    assert found["key-a"] != found["key-b"] and "key-a" not in str(found["key-a"])
    for path, body in bodies.items():
        assert served.post(path, body).status_code == 200
        assert served.engine.options[-1].client == "host 127.0.0.1"
