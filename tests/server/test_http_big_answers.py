"""Answers in pieces: the bytes are those of the whole answer, its headers are right, an error is
seen as one, and what a request holds is given back."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from ds_cp.api.answers import json_pieces, logprobs, paced
from ds_cp.api.answers.budget import REQUEST_BYTES, SMALL_BYTES, Budget, HoldMemory
from ds_cp.api.answers.logprobs import TokenTexts
from ds_cp.api.app import create_app
from ds_cp.config import Server
from ds_cp.outputs import TokenLogprob
from tests.helpers.fake_engine import FakeEngine, expected_ids, prompt_scores
from tests.server.conftest import Running, error_of, wait_for

C, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": 'say "\u20ac"\n' + "a fox " * 30}]
PROMPTS = [[*range(5, 60)], [9, 10, 250]]
Reply = tuple[dict[str, Any], dict[bytes, bytes], list[bytes]]


def app_over(engine: FakeEngine, **settings: Any) -> tuple[Any, Budget]:
    """The application and its budget."""
    app = create_app(engine, Server(**settings))
    layer: Any = next(layer for layer in app.user_middleware if layer.cls is HoldMemory)
    return app, layer.kwargs["budget"]


async def ask(app: Any, path: str, body: Any) -> Reply:
    """The start, the headers and the body messages of an answer."""
    data = json.dumps(body).encode()
    asked = [{"type": "http.request", "body": data, "more_body": False}]
    over = asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        if asked:
            return asked.pop()
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        assert not sent or sent[-1].get("more_body", True)
        sent.append(message)

    headers = [
        (b"host", b"127.0.0.1"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(data)),
    ]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1), "state": {},
    }  # fmt: skip
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    over.set()
    assert sent[-1]["more_body"] is False
    return sent[0], dict(sent[0]["headers"]), [message["body"] for message in sent[1:]]


class Expected:
    """The answers as plain values, from what the fake engine is known to say."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.texts = TokenTexts(engine)

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.texts.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    def drawn(self, prompt: list[int], count: int, index: int, top: int) -> list[TokenLogprob]:
        others = tuple((i, -1.0 - i) for i in range(top))
        ids, at, found = expected_ids(prompt, count, len(self.tokenizer), index), 0, []
        for token in ids:
            found.append(TokenLogprob(token, -0.5, others, at))
            at += len(self.tokenizer.decode([token]))
        return found

    def prompt_field(self, prompt: list[int], top: int) -> list[Any]:
        found: list[Any] = [None]
        for item in prompt_scores(prompt, top)[1:]:
            assert item is not None
            ranks = {token: rank for rank, (token, _) in enumerate(item.top, 1)}
            pairs = {item.token_id: item.logprob} | dict(item.top)
            found.append(
                {
                    str(token): {
                        "logprob": logprob,
                        "rank": ranks.get(token),
                        "decoded_token": self.texts.piece(token)[0],
                    }
                    for token, logprob in pairs.items()
                }
            )
        return found

    def chat(self, prompt: list[int], n: int, count: int, top: int | None, scores: int | None):
        choices = []
        for index in range(n):
            items = self.drawn(prompt, count, index, top or 0)
            content = [
                self.entry(item.token_id, item.logprob)
                | {"top_logprobs": [self.entry(*pair) for pair in item.top]}
                for item in items
            ]
            text = "".join(self.tokenizer.decode([item.token_id]) for item in items)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": None if top is None else {"content": content, "refusal": None},
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            )
        extra = {} if scores is None else {"prompt_logprobs": self.prompt_field(prompt, scores)}
        usage = self.usage([prompt], n * count)
        usage["usage"]["completion_tokens_details"] = {"reasoning_tokens": 0}
        return {"choices": choices} | extra | usage

    def completion(self, n: int, count: int, top: int | None, echo: bool, scores: int | None):
        choices = []
        for number, prompt in enumerate(PROMPTS):
            for index in range(n):
                items: list[Any] = self.drawn(prompt, count, index, top or 0)
                before = self.tokenizer.decode(prompt) if echo else ""
                text = before + "".join(self.tokenizer.decode([i.token_id]) for i in items)
                ids = [item.token_id for item in items]
                offsets = [len(before) + item.text_offset for item in items]
                if echo and top is not None:
                    ids, items = prompt + ids, [*prompt_scores(prompt, top), *items]
                    starts = [len(self.tokenizer.decode(prompt[:i])) for i in range(len(prompt))]
                    offsets = starts + offsets
                block = {
                    "tokens": [self.texts.label(token) for token in ids],
                    "token_logprobs": [item and item.logprob for item in items],
                    "top_logprobs": [
                        item
                        and {self.texts.label(i): p for i, p in item.top}
                        | {self.texts.label(item.token_id): item.logprob}
                        for item in items
                    ],
                    "text_offset": offsets,
                }
                choice = {"index": number * n + index, "text": text}
                choice |= {"logprobs": None if top is None else block}
                choice |= {"finish_reason": "length", "stop_reason": None}
                if scores is not None:
                    choice["prompt_logprobs"] = self.prompt_field(prompt, scores)
                choices.append(choice)
        return {"choices": choices} | self.usage(PROMPTS, len(choices) * count)

    @staticmethod
    def usage(prompts: list[list[int]], new: int) -> dict[str, Any]:
        old = sum(map(len, prompts))
        details = {"prompt_tokens_details": {"cached_tokens": 0}}
        counts = {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}
        return {"usage": counts | details}


KINDS = {
    "chat": (CHAT, {"max_tokens": 5}, None),
    "chat, scored": (CHAT, {"logprobs": True, "top_logprobs": 3, "max_tokens": 5, "n": 3}, None),
    "chat, chosen only": (CHAT, {"logprobs": True, "max_tokens": 2}, None),
    "chat, prompt": (CHAT, {"prompt_logprobs": 2, "max_tokens": 2, "n": 2}, None),
    "text": (C, {"max_tokens": 5, "n": 2}, None),
    "text, scored": (C, {"max_tokens": 5, "n": 2, "logprobs": 3}, None),
    "text, echo": (C, {"max_tokens": 3, "n": 2, "echo": True}, None),
    "text, echo scored": (C, {"max_tokens": 3, "n": 2, "echo": True, "logprobs": 2}, None),
    "text, prompt": (C, {"max_tokens": 3, "n": 2, "prompt_logprobs": 3, "logprobs": 0}, None),
    "tokens": ("/tokenize", {"prompt": "one two three " * 300}, None),
    "no tokens": ("/tokenize", {"prompt": ""}, None),
    "words": ("/detokenize", {"tokens": [*range(4, 300)] * 20}, None),
}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_whole(tokenizer: Any, monkeypatch: Any, kind: str, size: str) -> None:
    """Every kind of answer, byte for byte as ``json.dumps`` of plain values has it."""
    if size == "large":  # so that these answers are
        monkeypatch.setattr(paced, "SMALL_BYTES", 10)
        monkeypatch.setattr(paced, "BATCH_BYTES", 50)
        monkeypatch.setattr(logprobs, "_SLICE", 7)
        for name in ("TEXT_CHARS", "LIST_ITEMS", "LIST_BYTES"):
            monkeypatch.setattr(json_pieces, name, 11)
    engine = FakeEngine(tokenizer, max_model_len=8192)
    path, body, _ = KINDS[kind]
    body = dict(body)
    if path == CHAT:
        body["messages"] = MESSAGES
    if path == C:
        body["prompt"] = PROMPTS
    app, budget = app_over(engine)
    start, headers, messages = asyncio.run(ask(app, path, body))
    got = b"".join(messages)
    assert start["status"] == 200 and headers[b"content-type"] == b"application/json"
    if size == "small":
        assert len(messages) == 1 and int(headers[b"content-length"]) == len(got)
    else:
        assert len(messages) >= 2 and b"content-length" not in headers
        assert max(map(len, messages)) <= 1000
    expected = Expected(engine)
    want: dict[str, Any] = {}
    if path in (C, CHAT):
        given = json.loads(got)
        want = {name: given[name] for name in ("id", "object", "created", "model")}
    n, count, scores = body.get("n", 1), body.get("max_tokens"), body.get("prompt_logprobs")
    if path == CHAT:
        top = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
        want |= expected.chat(engine.seen[0][0], n, count, top, scores)
    elif path == C:
        echo = body.get("echo", False)
        want |= expected.completion(n, count, body.get("logprobs"), echo, scores)
    elif path == "/tokenize":
        ids = tokenizer(body["prompt"])["input_ids"]
        want = {"count": len(ids), "max_model_len": 8192, "tokens": ids}
    else:
        want = {"prompt": tokenizer.decode(body["tokens"])}
    assert got == json.dumps(want, ensure_ascii=False, separators=(",", ":")).encode()
    assert budget.used == 0


@pytest.mark.parametrize("body", [{"echo": True}, {"echo": True, "logprobs": 20}])
def test_pieces_of_a_stream(tokenizer: Any, monkeypatch: Any, body: dict[str, Any]) -> None:
    """A long prompt is echoed in many chunks, none of them large."""
    monkeypatch.setattr("ds_cp.api.answers.completions.ECHO_CHARS", 1000)
    engine = FakeEngine(tokenizer, max_model_len=8192)
    prompt = [*range(4, 200)] * 30
    app, budget = app_over(engine)
    body = {"prompt": prompt, "stream": True, "max_tokens": 0} | body
    _, headers, messages = asyncio.run(ask(app, C, body))
    assert headers[b"content-type"].startswith(b"text/event-stream")
    events = [e for e in b"".join(messages).split(b"\n\n") if e]
    assert events[-1] == b"data: [DONE]"
    choices = [json.loads(e.removeprefix(b"data: "))["choices"][0] for e in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == tokenizer.decode(prompt)
    assert len(choices) > 6 and max(map(len, events)) < 100_000
    assert max(map(len, messages)) < paced.BATCH_BYTES + 100_000
    assert budget.used == 0


OPEN = {"messages": MESSAGES, "stream": True}
SCORED = OPEN | {"logprobs": True, "top_logprobs": 5}


@pytest.mark.parametrize("body", [OPEN, SCORED, SCORED | {"stream": False}])
def test_a_chat_without_max_tokens_is_a_small_request(tokenizer: Any, body: Any) -> None:
    """It could get 128K tokens: 6 MB, and 100 MB with five alternatives."""
    held: list[int] = []

    class Watched(FakeEngine):
        async def generate(self, *args: Any) -> Any:
            held.append(budget.used)
            async for delta in super().generate(*args):
                yield delta

    engine = Watched(tokenizer, max_model_len=131_072)
    engine.info = replace(engine.info, largest_request_tokens=131_072)
    engine.open_tokens = 20
    app, budget = app_over(engine)
    start, _, _ = asyncio.run(ask(app, CHAT, body))
    assert start["status"] == 200 and engine.seen[0][1].max_tokens in (None, 166_666)
    assert REQUEST_BYTES < held[0] < SMALL_BYTES and budget.used == 0


# -- over a real connection --------------------------------------------------------------------


def big_body(n: int = 8) -> dict[str, Any]:
    return {"prompt": [5] * 20, "logprobs": 20, "max_tokens": 100, "n": n, "prompt_logprobs": 5}


def test_large_and_small_answers_on_one_connection(served: Running) -> None:
    with httpx.Client(base_url=served.url, timeout=20, verify=False) as client:
        for _ in range(2):
            large = client.post(C, json=big_body())
            assert large.headers["transfer-encoding"] == "chunked"
            assert "content-length" not in large.headers
            assert large.headers["content-type"] == "application/json"
            assert large.headers["x-request-id"]
            assert len(large.content) > 3 * paced.BATCH_BYTES
            assert len(large.json()["choices"][7]["logprobs"]["tokens"]) == 100
            small = client.post(C, json={"prompt": [5]})
            assert int(small.headers["content-length"]) == len(small.content)
    assert served.engine.aborted == []


def spoil(served: Running, token: int) -> None:
    """Let the answer fail where the prompt's log-probability of ``token`` (in the prompt) is
    encoded."""

    def scores(delta: Any, prompt: list[int], params: Any) -> Any:
        found = list(prompt_scores(prompt, params.prompt_logprobs))
        if token in prompt:
            found[prompt.index(token)] = TokenLogprob(token, float("nan"))
        return replace(delta, prompt_logprobs=tuple(found))

    served.engine._with_prompt = scores  # type: ignore[method-assign]


def test_an_error_before_the_first_byte_is_a_status(served: Running) -> None:
    spoil(served, 9)
    reply = served.post(C, {"prompt": [5, 9], "prompt_logprobs": 0, "max_tokens": 1})
    assert error_of(reply, 500)["code"] == "internal_error"


def test_a_later_error_cuts_the_answer_off(served: Running) -> None:
    """The client's library says so: nobody takes a part for the whole."""
    spoil(served, 9)
    body = big_body() | {"prompt": [[5] * 20, [5, 9]]}
    with httpx.stream("POST", served.url + C, json=body, timeout=20, verify=False) as reply:
        assert reply.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            reply.read()
    scored = {"prompt_logprobs": body.pop("prompt_logprobs")}
    with pytest.raises(openai.APIConnectionError):
        served.client().completions.create(model="fake-model", **body, extra_body=scored)
    assert served.get("/health").status_code == 200


def test_what_does_not_fit_is_told_to_come_again(
    launch: Callable[..., Running], tokenizer: Any
) -> None:
    """16 MiB: a request of 12 MiB at most, and one of 10 while another of 10 runs."""
    engine = FakeEngine(tokenizer, max_model_len=8192)
    server = launch(engine, max_buffered_bytes="16MiB")
    body = {"prompt": [5], "logprobs": 20, "max_tokens": 4000}  # 10.3 MiB
    error = error_of(server.post(C, body | {"n": 2}), 400)
    assert error["code"] == "request_too_large" and "server.max_buffered_bytes" in error["message"]
    engine.delay_s = 0.05
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as running:
        running.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert wait_for(lambda: len(engine.live) == 1)
        refused = server.post(C, body)
        error = error_of(refused, 503)
        assert error["code"] == "server_busy" and refused.headers["retry-after"] == "1"
        assert error["type"] == "service_unavailable_error"
        assert re.search(r"need 10\.\d MiB .* 10\.\d of 16\.0 MiB", error["message"])
        with pytest.raises(openai.InternalServerError):
            server.client().completions.create(model="fake-model", **body)
        assert server.post(C, {"prompt": [5], "max_tokens": 1}).status_code == 200  # a small one
    assert wait_for(lambda: not engine.live)
    engine.delay_s = 0.0
    assert wait_for(lambda: server.post(C, body).status_code == 200)


def test_large_bodies_are_counted(launch: Callable[..., Running]) -> None:
    server = launch(max_buffered_bytes="16MiB")
    body = {"prompt": "a" * 3_000_000}
    error = error_of(server.post(C, body), 400)
    assert error["code"] == "request_too_large"
    assert server.post(C, {"prompt": [5]}).status_code == 200
