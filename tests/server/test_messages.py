"""POST /v1/messages through the real anthropic client: whole, streamed, tools, thinking, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import pytest

from ds_cp.errors import EngineDeadError, QueueFullError
from tests.server.conftest import Running, wait_for

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TOOL = {
    "name": "weather",
    "description": "Weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
HELLO: Any = {
    "model": "fake-model",
    "max_tokens": 500,
    "messages": [{"role": "user", "content": "hi"}],
}
Launch = Callable[..., Running]


def client_of(server: Running, key: str = "none") -> Any:
    return anthropic.Anthropic(
        base_url=server.url,
        api_key=key,
        max_retries=0,
        timeout=20.0,
        http_client=anthropic.DefaultHttpxClient(verify=False),
    )


def error_of(reply: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in Anthropic's shape."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == kind
    assert body["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    message: str = body["error"]["message"]
    assert message and "\n" not in message
    return message


def test_a_whole_message(spoken: Launch) -> None:
    server = spoken("hello there")
    server.engine.cached = 2
    system = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
    message = client_of(server).messages.create(**HELLO, system=system)
    assert [(block.type, block.text) for block in message.content] == [("text", "hello there")]
    assert (message.role, message.stop_reason, message.stop_sequence) == (
        "assistant",
        "end_turn",
        None,
    )
    assert message.id.startswith("msg_") and message.model == "fake-model" and message._request_id
    assert server.engine.options[-1].http_id == message._request_id  # as its line in the log has it
    prompt = len(server.engine.seen[0][0])
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (prompt - 2, 2)
    assert usage.output_tokens == 4
    assert server.engine.prompts == ["<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"]


def test_a_stream_is_what_the_client_joins(spoken: Launch) -> None:
    server = spoken(f"<think>let me see</think>I look.{CALL}")
    ask = HELLO | {"tools": [TOOL]}
    with client_of(server).messages.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].thinking == "let me see" and final.content[0].signature
    assert final.content[1].text == "I look."
    assert (final.content[2].name, final.content[2].input) == ("weather", {"city": "Bonn"})
    assert final.stop_reason == "tool_use"
    assert final.usage.input_tokens == len(server.engine.seen[0][0])
    assert final.usage.output_tokens_details.thinking_tokens > 0
    whole = client_of(server).messages.create(**ask)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.content[2].input == {"city": "Bonn"} and whole.stop_reason == "tool_use"


def test_the_frames_of_a_stream(spoken: Launch) -> None:
    server = spoken("abcdef", keep_alive_s=0.1)
    server.engine.delay_s = 0.5
    text = server.post("/v1/messages", HELLO | {"stream": True}).text
    frames = [frame.split("\n") for frame in text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    kinds = [event["type"] for event in events]
    assert kinds.count("ping") >= 2  # one at the beginning, and while nothing comes
    assert [kind for kind in kinds if kind != "ping"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert kinds[:2] == ["message_start", "ping"]


def test_a_conversation_with_tools(spoken: Launch) -> None:
    server = spoken(f"<think>hm</think>{CALL}", "It rains.")
    client = client_of(server)
    ask = HELLO | {"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]}
    first = client.messages.create(**ask)
    use = first.content[-1]
    messages = [
        *HELLO["messages"],
        first.to_param(),
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}]},
    ]  # fmt: skip
    second = client.messages.create(**ask | {"messages": messages})
    assert second.content[0].text == "It rains."
    prompt = server.engine.prompts[-1]
    assert "<|assistant|><think>hm</think><tool_call>" in prompt
    assert prompt.endswith("<tool_response>rain</tool_response><|end|><|assistant|>")
    reply = server.post("/v1/messages", ask)
    assert reply.headers["x-ds-cp-warning"].endswith("tools.web_search_20250305")


@pytest.mark.parametrize(
    "choice",
    [{"type": "any"}, {"type": "tool", "name": "weather"}],
)
def test_a_call_can_be_forced(spoken: Launch, choice: Any) -> None:
    server = spoken(CALL)
    message = client_of(server).messages.create(**HELLO, tools=[TOOL], tool_choice=choice)
    assert message.content[0].type == "tool_use"
    wish = server.engine.seen[-1][1].structured_outputs
    assert wish.structural_tag["at_least"] == 1
    config = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    client_of(server).messages.create(
        **HELLO, tools=[TOOL], tool_choice=choice, output_config=config
    )
    assert server.engine.seen[-1][1].structured_outputs == wish
    client_of(server).messages.create(**HELLO, tools=[TOOL], tool_choice={"type": "none"})
    assert server.engine.seen[-1][1].structured_outputs is None
    assert "weather" not in server.engine.prompts[-1]


def test_the_clients_tool_runner_goes_on_without_a_thread(spoken: Launch) -> None:
    """It wants the server to hold the conversation, and would send the result of a call alone."""
    server = spoken(CALL)

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Weather of a city."""
        return f"Rain in {city}."

    runner = client_of(server).beta.messages.tool_runner(**HELLO, tools=[weather], max_iterations=2)
    assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert "<|user|>hi" in server.engine.prompts[-1]
    assert "Rain in Bonn." in server.engine.prompts[-1]
    refused = httpx.post(f"{server.url}/v1/messages", json=HELLO | {"thread": {"type": "create"}})
    assert refused.status_code == 400
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert refused.json()["error"]["details"] == details


def test_why_it_stops(spoken: Launch) -> None:
    server = spoken("hello STOP there")
    client = client_of(server)
    message = client.messages.create(**HELLO, stop_sequences=["STOP", "x"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")
    assert message.content[0].text == "hello "
    message = client.messages.create(**HELLO | {"max_tokens": 2})
    assert (message.stop_reason, message.content[0].text) == ("max_tokens", "hello ")
    # More than fits is lowered to what does, and an answer that fills it says so.
    message = client.messages.create(**HELLO | {"max_tokens": 100_000})
    assert message.stop_reason == "end_turn"
    room = 8192 - len(server.engine.seen[-1][0])
    assert server.engine.seen[-1][1].max_tokens == room
    server.engine.say = ["abc" * 9000]
    message = client.messages.create(**HELLO | {"max_tokens": 100_000})
    assert message.stop_reason == "model_context_window_exceeded"
    message = client.messages.create(**HELLO | {"max_tokens": room})
    assert message.stop_reason == "max_tokens"


def test_an_answer_goes_on_with_the_last_message(spoken: Launch) -> None:
    server = spoken(" (C) Helios")
    messages = [*HELLO["messages"], {"role": "assistant", "content": "The answer is"}]
    message = client_of(server).messages.create(**HELLO | {"messages": messages})
    assert message.content[0].text == " (C) Helios"
    assert server.engine.prompts[-1].endswith("<|assistant|>The answer is")


def test_thinking(spoken: Launch) -> None:
    server = spoken("<think>hm</think>yes")
    client = client_of(server)
    message = client.messages.create(**HELLO, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in message.content] == ["thinking", "text"]
    omitted = {"type": "adaptive", "display": "omitted"}
    message = client.messages.create(**HELLO, thinking=omitted)
    assert (message.content[0].thinking, message.content[1].text) == ("", "yes")
    server.engine.say = ["yes"]
    client.messages.create(**HELLO, thinking={"type": "disabled"})
    assert server.engine.prompts[-1].endswith("<|assistant|><think></think>")


def test_a_client_hears_while_it_sees_nothing(spoken: Launch) -> None:
    """Tokens of hidden thinking come, and a proxy would take the silence for a dead server."""
    server = spoken("<think>" + "hm " * 20 + "</think>yes", keep_alive_s=0.1)
    server.engine.delay_s = 0.03
    ask = HELLO | {"stream": True, "thinking": {"type": "adaptive", "display": "omitted"}}
    text = server.post("/v1/messages", ask).text
    before = text[: text.index("text_delta")]
    assert before.count("event: ping") >= 2 and "thinking_delta" not in text


def test_a_format(spoken: Launch) -> None:
    server = spoken('{"x": 1}')
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = client_of(server).messages.create(**HELLO, output_config=config)
    assert json.loads(message.content[0].text) == {"x": 1}
    assert server.engine.seen[-1][1].structured_outputs is not None


def test_tokens_are_counted(spoken: Launch) -> None:
    server = spoken("a")
    client = client_of(server)
    ask = {"model": "fake-model", "messages": HELLO["messages"], "system": "x", "tools": [TOOL]}
    count = client.messages.count_tokens(**ask).input_tokens
    message = client.messages.create(**ask, max_tokens=5)
    assert count == message.usage.input_tokens and len(server.engine.seen) == 1


def test_errors_have_the_shape_of_the_protocol(spoken: Launch) -> None:
    server = spoken("a")
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        text = error_of(server.post(path, HELLO | {"messages": []}), 400, "invalid_request_error")
        assert "messages" in text
        error_of(server.post(path, HELLO | {"model": "claude"}), 404, "not_found_error")
        reply = httpx.post(
            server.url + path, content=b"{", headers={"content-type": "text/plain"}, verify=False
        )
        error_of(reply, 415, "invalid_request_error")
        reply = httpx.post(
            server.url + path,
            content=b"{",
            headers={"content-type": "application/json"},
            verify=False,
        )
        error_of(reply, 400, "invalid_request_error")
        error_of(httpx.get(server.url + path, verify=False), 405, "invalid_request_error")
    error_of(server.post("/v1/messages/batches", {}), 404, "not_found_error")
    result = {"type": "tool_result", "tool_use_id": "t9", "content": "x"}
    messages = [{"role": "user", "content": [result]}]
    text = error_of(
        server.post("/v1/messages", HELLO | {"messages": messages}), 400, "invalid_request_error"
    )
    assert "tool_result" in text and "'t9'" in text
    long = [{"role": "user", "content": "x " * 9000}]
    text = error_of(
        server.post("/v1/messages", HELLO | {"messages": long}), 400, "invalid_request_error"
    )
    assert "8192" in text
    small = spoken("a", max_body_bytes=2000)
    error_of(small.post("/v1/messages", HELLO | {"system": "x" * 3000}), 413, "request_too_large")
    with pytest.raises(anthropic.NotFoundError):
        client_of(server).messages.create(**HELLO | {"model": "claude"})


@pytest.mark.parametrize("state", ["starting", "stopping", "dead"])
def test_errors_before_and_after_it_serves(spoken: Launch, state: str) -> None:
    server = spoken("a")
    server.engine.state = state
    try:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            error_of(server.post(path, HELLO), 503, "overloaded_error")
    finally:
        server.engine.state = "ready"


def test_the_key_is_x_api_key(spoken: Launch) -> None:
    server = spoken("a", api_key=("k" * 20,))
    assert client_of(server, "k" * 20).messages.create(**HELLO).content[0].text == "a"
    error_of(server.post("/v1/messages", HELLO), 401, "authentication_error")
    with pytest.raises(anthropic.AuthenticationError):
        client_of(server, "wrong").messages.create(**HELLO)
    models = client_of(server, "k" * 20).models.list().data
    assert [(model.id, model.type) for model in models] == [("fake-model", "model")]


def test_failures(spoken: Launch) -> None:
    server = spoken("hello there")
    client = client_of(server)
    server.engine.break_after = (2, EngineDeadError("gone"))
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(**HELLO) as stream,
    ):
        list(stream)
    assert caught.value.body["error"]["type"] == "overloaded_error"
    server.engine.break_after, server.engine.refuse = None, QueueFullError("full")
    for stream in (False, True):
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(**HELLO, stream=stream)


def test_a_client_that_leaves_ends_its_stream(spoken: Launch) -> None:
    server = spoken("hello there " * 50)
    server.engine.delay_s = 0.05
    with client_of(server).messages.stream(**HELLO | {"max_tokens": 4000}) as stream:
        next(iter(stream.text_stream))
    assert wait_for(lambda: bool(server.engine.aborted), 20)
