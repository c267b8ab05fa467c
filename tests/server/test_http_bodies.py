"""Bodies over a real socket: unknown fields, repeated keys, overflow, large bodies at once."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from ds_cp.api.answers.budget import ID_BYTES
from ds_cp.api.requests import bodies
from ds_cp.api.requests.bodies import HELD_BODIES, MODEL_BYTES, SMALL_BYTES, Bodies, kept_bytes
from ds_cp.api.requests.chat_body import ChatCompletionRequest as ChatRequest
from ds_cp.api.requests.json_route import warning
from ds_cp.api.requests.protocol import CompletionRequest
from ds_cp.api.transport.connection import Connection
from tests.helpers.fake_engine import FakeEngine, make_tokenizer
from tests.server.conftest import PATIENCE_S, Running, error_of, wait_for

C, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    (C, {"prompt": "x", "max_tokens": 2}),
    (CHAT, {"messages": HELLO, "max_tokens": 2}),
    ("/tokenize", {"prompt": "x"}),
    ("/detokenize", {"tokens": [5, 6]}),
]
HEADER = "x-ds-cp-warning"


def send(served: Running, path: str, text: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(
        served.url + path, content=text, headers=headers, timeout=PATIENCE_S, verify=False
    )


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_ignored_fields_are_named_in_a_header(
    served: Running, path: str, body: dict[str, Any]
) -> None:
    plain = served.post(path, body)
    assert plain.status_code == 200 and HEADER not in plain.headers
    odd = {"session_id": "s", "b\r\nSet-Cookie: x": 1, "é" * 99: 2, "nothing": None}
    reply = served.post(path, body | odd)
    assert reply.status_code == 200
    said = "ignored unknown fields: session_id, b??Set-Cookie??x, " + "?" * 40
    assert reply.headers[HEADER] == said and "set-cookie" not in reply.headers
    if path in (C, CHAT):
        stream = served.post(path, body | odd | {"stream": True})
        assert stream.headers[HEADER] == said and "data: [DONE]" in stream.text
    model = {"model": "other"}
    refused = served.post(path, body | odd | model)
    assert refused.status_code == 404 and refused.headers[HEADER] == said
    count = 6.0 if path in (C, CHAT) else 3.0
    counted = f'ds_cp:ignored_fields_total{{model_name="fake-model"}} {count}'
    assert counted in served.get("/metrics").text.splitlines()


def test_the_warning_is_short() -> None:
    assert warning(["a", "b"]) == "ignored unknown fields: a, b"
    assert warning([f"f{i}" for i in range(30)]).endswith("f6, f7 and 22 more")
    assert len(warning(["x" * 100] * 32)) < 400


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_unknown_fields_can_be_refused(
    launch: Callable[..., Running], path: str, body: dict[str, Any]
) -> None:
    served = launch(unknown_fields="refuse")
    error = error_of(served.post(path, body | {"session_id": "s"}), 400)
    assert error["param"] == "session_id" and "unknown field 'session_id'" in error["message"]
    reply = served.post(path, body | {"session_id": None})
    assert reply.status_code == 200 and HEADER not in reply.headers


@pytest.mark.parametrize("size", [0, 2 * SMALL_BYTES])
@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_key_that_is_given_twice_is_refused_everywhere(
    served: Running, path: str, body: dict[str, Any], size: int
) -> None:
    """As in the config: in every object of a small and of a large body, also in what is ignored."""
    start, pad = json.dumps(body)[:-1], " " * size
    name = next(iter(body))
    for text, key in (
        (f'{start}, {pad} "{name}": "x"}}', name),
        (f'{start}, {pad} "session_id": 1, "session_id": 1}}', "session_id"),
        (f'{start}, {pad} "session": [{{"x": {{"k": 1, "\\u006b": null}}}}]}}', "k"),
        (f'{start}, {pad} "metadata": {{"k": 1, "k": 1}}}}', "k"),
    ):
        error = error_of(send(served, path, text), 400)
        assert error["param"] == key and error["code"] == "invalid_json"
        assert "is given twice" in error["message"]
    nested = {
        C: '{"prompt": "x", "logit_bias": {"5": 1, "5": 2}}',
        CHAT: '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", '
        '"text": "b"}]}]}',
        "/tokenize": '{"messages": [{"role": "user", "role": "system", "content": "x"}]}',
    }
    if path in nested:
        error = error_of(send(served, path, nested[path][:-1] + pad + "}"), 400)
        assert "is given twice" in error["message"]


def test_overflow_begins_as_openais(served: Running) -> None:
    for path, body, words in (
        (C, {"prompt": [5] * 100, "max_tokens": 29}, "129 tokens (100 in the prompt, 29 in the"),
        (C, {"prompt": [5] * 129}, "130 tokens (129 in the prompt, 1 in the"),
        (CHAT, {"messages": HELLO, "max_tokens": 500}, " in the messages, 500 in the"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 500}, " in the messages, 500 in the"),
    ):
        error = error_of(served.post(path, body), 400)
        what = "prompt" if path == C else "messages"
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith(
            "This model's maximum context length is 128 tokens. However, you requested "
        )
        assert words in error["message"]
        assert f"Please reduce the length of the {what} or completion" in error["message"]
        assert "have 128; shorten the prompt" in error["message"]
        assert error["message"].endswith(" (context_length_exceeded)")  # langchain looks for it


def test_top_p_0_is_greedy(served: Running) -> None:
    for path, body in ROUTES[:2]:
        assert served.post(path, body | {"top_p": 0, "temperature": 1.5}).status_code == 200
        params = served.engine.seen[-1][1]
        assert (params.temperature, params.top_p) == (0.0, 1.0)


def test_a_name_reaches_the_template_and_parts_are_joined(launch: Callable[..., Running]) -> None:
    template = "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}|{% endfor %}"
    engine = FakeEngine(make_tokenizer(template))
    served = launch(engine)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]
    messages = [
        {"role": "user", "name": "ann", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "user", "content": "c"},
    ]
    ids = served.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert engine.tokenizer.decode(ids) == "ann: a\nb|assistant: |assistant: |user: c|"


def test_only_what_the_template_reads_can_be_set(launch: Callable[..., Running]) -> None:
    template = "{% if enable_thinking is defined %}no{% endif %}{{ messages[0].content }} "
    template += "{% for m in messages[1:] %}{{ m['a'] + 'a think' + m.role }}{% endfor %} a"
    served = launch(FakeEngine(make_tokenizer(template)))
    body = {"messages": HELLO, "max_tokens": 2}
    for given in (
        {},
        {"enable_thinking": None},
        {"other": False},
        None,
        {"role": False},
        {"a": False},
        {"thinking": False},
        {"think": False},
        {"messages": False},
    ):
        assert served.post(CHAT, body | {"chat_template_kwargs": given}).status_code == 200
    for given in ({"other": 1}, {"role": True}, {"a": 1}, {"think": True}, {"messages": [1]}):
        error = error_of(served.post(CHAT, body | {"chat_template_kwargs": given}), 400)
        assert error["param"] == "chat_template_kwargs" and next(iter(given)) in error["message"]
    for value in (True, False):  # it is defined either way
        given = {"chat_template_kwargs": {"enable_thinking": value}}
        ids = served.post("/tokenize", {"messages": HELLO} | given).json()["tokens"]
        assert served.engine.tokenizer.decode(ids).startswith("no")


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what servers have read from their connections."""
    sizes: list[int] = []
    whole = Connection.data_received

    def count(self: Connection, data: bytes) -> None:
        sizes.append(len(data))
        whole(self, data)

    monkeypatch.setattr(Connection, "data_received", count)
    return sizes


def test_stalled_large_bodies_make_room(
    launch: Callable[..., Running], received: list[int]
) -> None:
    """They hold what they have sent. Small bodies do not notice; a large one waits for the slowest
    to be cut off."""
    served = launch(max_body_bytes=2**20, body_timeout_s=60.0)
    head = (
        f"POST {C} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {2**20}\r\n\r\n"
    ).encode()
    large = json.dumps({"prompt": "x", "max_tokens": 1, "metadata": {"a": "b" * 200_000}})
    with ExitStack() as stack:
        held = []
        for _ in range(HELD_BODIES):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            connection.sendall(head + b"{" + b" " * 900_000)
            held.append(connection)
        assert wait_for(lambda: sum(received) > HELD_BODIES * 900_000)

        def answered() -> bytes:
            found = b""
            for connection in held:
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    found += connection.recv(1000)
            return found

        assert send(served, C, '{"prompt": "x"}').status_code == 200
        assert answered() == b"", "nothing was cut off for a small one"
        assert send(served, C, large).status_code == 200
        cut = answered()
        assert cut.count(b"HTTP/1.1 408") == 1 and b"others wait for its room" in cut
    assert send(served, C, large).status_code == 200


def stalled(served: Running, stack: ExitStack, length: int, sent: int) -> None:
    """A body of which ``sent`` bytes have come."""
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
    connection.sendall(
        f"POST {C} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n{'{':<{sent}}".encode()
    )


@pytest.mark.parametrize("budget", ["auto", "16MiB"])
def test_no_room_is_a_503_with_retry_after(
    launch: Callable[..., Running], received: list[int], budget: str, monkeypatch: Any
) -> None:
    """Bodies share 16 times the largest, and half of the budget."""
    monkeypatch.setattr(bodies, "GRACE_S", 600.0)  # none is cut off meanwhile
    served = launch(max_body_bytes=600_000, body_timeout_s=1.0, max_buffered_bytes=budget)
    large = json.dumps({"prompt": "x", "max_tokens": 1, "metadata": {"a": "b" * 590_000}})
    with ExitStack() as stack:
        count = HELD_BODIES if budget == "auto" else 2
        for _ in range(count):
            stalled(served, stack, 600_000, 90_000)
        assert wait_for(lambda: sum(received) > count * 90_000)
        reply = send(served, C, large)
        assert error_of(reply, 503)["code"] == "bodies_busy"
        assert reply.headers["retry-after"] == "1"
        assert send(served, C, '{"prompt": "x"}').status_code == 200
    assert wait_for(lambda: send(served, C, large).status_code == 200)


def test_a_body_that_was_parsed_makes_room(launch: Callable[..., Running]) -> None:
    """While its answer is made it holds what the request keeps, and no more."""
    engine = FakeEngine(make_tokenizer(), max_model_len=200_000)
    engine.first_delay_s = 600.0
    served = launch(engine, max_body_bytes=600_000, body_timeout_s=1.0, max_buffered_bytes="16MiB")
    large = json.dumps({"prompt": "x", "max_tokens": 1, "metadata": {"a": "b" * 590_000}})
    with ExitStack() as stack:
        for number in range(2 * HELD_BODIES):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            connection.sendall(
                f"POST {C} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(large)}\r\n\r\n{large}".encode()
            )
            assert wait_for(lambda number=number: len(engine.live) == number + 1)


def test_what_a_request_keeps_of_its_body_stays_charged() -> None:
    kept = kept_bytes(CompletionRequest.model_validate({"prompt": "a" * 1000, "stop": "b" * 100}))
    assert 1100 + MODEL_BYTES <= kept <= 1300 + MODEL_BYTES
    kept = kept_bytes(CompletionRequest.model_validate({"prompt": [[5] * 100, [5] * 50]}))
    assert kept == 150 * ID_BYTES + MODEL_BYTES
    chat = {"messages": [{"role": "user", "content": "\U0001f600" * 1000}] * 3}
    kept = kept_bytes(ChatRequest.model_validate(chat))
    assert 3 * 4000 + 4 * MODEL_BYTES <= kept <= 3 * 4200 + 4 * MODEL_BYTES


@pytest.mark.parametrize("length", ["0" * 5000 + "14", "9" * 5000, "14"])
def test_no_declared_length_is_too_long_to_read(length: str) -> None:
    scope = {"type": "http", "headers": [(b"content-length", length.encode())]}
    expected = Bodies(10**6, 1.0, lambda: 0, 10**9)._expected(Request(scope))
    assert expected == (14 if length == "14" else 10**6)


def test_a_large_body_waits_for_a_model(launch: Callable[..., Running]) -> None:
    """How much may be in it depends on the model's length, which a stalled engine has too."""
    engine = FakeEngine(make_tokenizer(), max_model_len=1_300_000)
    served = launch(engine)
    large = json.dumps({"prompt": [5] * 1_200_000, "max_tokens": 1})
    engine.state = "starting"
    assert send(served, C, '{"prompt": "x", "session_id": 1}').status_code == 503
    reply = send(served, C, large)
    assert error_of(reply, 503)["code"] == "engine_starting" and "retry-after" in reply.headers
    engine.state = "stalled"
    assert send(served, C, large).status_code == 200


def test_prompts_are_refused_one_by_one(launch: Callable[..., Running]) -> None:
    """The second is not encoded when the first is longer than the model."""
    engine = FakeEngine(make_tokenizer(), max_model_len=128)
    encoded = []
    tokenizer = engine.tokenizer

    class Counting:
        def __call__(self, text: str, **rest: Any) -> Any:
            encoded.append(text)
            return tokenizer(text, **rest)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    engine.tokenizer = Counting()
    served = launch(engine)
    error = error_of(served.post(C, {"prompt": ["a fox " * 300] * 64}), 400)
    assert error["code"] == "context_length_exceeded" and len(encoded) == 1
