"""POST /v1/responses through the real openai client: whole, streamed, tools, reasoning, store."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from ds_cp.errors import EngineDeadError, QueueFullError
from tests.server.conftest import Running, error_of, wait_for

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
Launch = Callable[..., Running]


def test_a_whole_response(spoken: Launch) -> None:
    server = spoken("hello there")
    server.engine.cached = 2
    reply = server.client().responses.create(
        model="fake-model", input="hi", instructions="be brief", metadata={"a": "b"}
    )
    assert reply.output_text == "hello there" and reply.status == "completed"
    assert reply.id.startswith("resp_") and reply.model == "fake-model"
    assert reply.metadata == {"a": "b"} and reply.instructions == "be brief"
    assert reply.usage.output_tokens == 4 and reply.usage.input_tokens_details.cached_tokens == 2
    assert server.engine.prompts == ["<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"]
    (params,) = [params for _, params in server.engine.seen]
    assert params.max_tokens is None and params.n == 1


def test_a_stream_is_what_the_client_joins(spoken: Launch) -> None:
    server = spoken(f"<think>let me see</think>I look.{CALL}")
    with server.client().responses.stream(model="fake-model", input="x", tools=[TOOL]) as stream:
        kinds = [event.type.removeprefix("response.") for event in stream]
        final = stream.get_final_response()
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-2:] == ["output_item.done", "completed"]
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output[0].content[0].text == "let me see" and final.output_text == "I look."
    call = final.output[2]
    assert (call.name, call.parsed_arguments) == ("weather", {"city": "Bonn"})
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    # The same as a whole answer, and as it is kept.
    whole = server.client().responses.create(model="fake-model", input="x", tools=[TOOL])
    assert [item.type for item in whole.output] == [item.type for item in final.output]
    assert whole.output[2].arguments == call.arguments
    kept = server.client().responses.retrieve(final.id)
    assert kept.output_text == "I look." and kept.status == "completed"
    assert kept.output[2].id == call.id


def test_the_frames_of_a_stream(spoken: Launch) -> None:
    """Named events with numbers from 0, and nothing after the last."""
    server = spoken("abcdef")
    text = server.post("/v1/responses", {"input": "x", "stream": True}).text
    frames = [frame.split("\n") for frame in text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events] == [
        f"response.{kind}"
        for kind in (
            "created", "in_progress", "output_item.added", "content_part.added",
            "output_text.delta", "output_text.delta", "output_text.done", "content_part.done",
            "output_item.done", "completed",
        )
    ]  # fmt: skip


def test_a_conversation_with_tools_by_the_store(spoken: Launch) -> None:
    server = spoken(f"<think>hm</think>{CALL}", "It rains.", "Bye.")
    client = server.client()
    first = client.responses.create(model="fake-model", input="Bonn?", tools=[TOOL])
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = client.responses.create(
        model="fake-model", previous_response_id=first.id, input=[result], tools=[TOOL]
    )
    assert second.output_text == "It rains." and second.previous_response_id == first.id
    prompt = server.engine.prompts[-1]
    assert "<|user|>Bonn?<|end|><|assistant|>" in prompt and "<think>hm</think>" in prompt
    assert '"name": "weather", "arguments": {"city": "Bonn"}' in prompt
    assert prompt.endswith("<tool_response>rain</tool_response><|end|><|assistant|>")
    # The first may go: what it said is part of the second.
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    client.responses.create(model="fake-model", previous_response_id=second.id, input="thanks")
    assert server.engine.prompts[-1].count("<tool_response>rain") == 1
    items = client.responses.input_items.list(second.id).data
    assert [(item.type, item.output) for item in items] == [("function_call_output", "rain")]


def test_a_conversation_without_the_store(spoken: Launch) -> None:
    """A client that keeps all itself sends the output back as it came, reasoning sealed."""
    server = spoken(f"<think>hm</think>I look.{CALL}", "It rains.")
    client = server.client()
    ask: Any = {"model": "fake-model", "store": False, "tools": [TOOL]}
    items: list[Any] = [{"role": "user", "content": "Bonn?"}]
    first = client.responses.create(input=items, include=["reasoning.encrypted_content"], **ask)
    assert not first.store
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items[1].pop("content")  # as clients do that may not see it
    items.append(
        {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "rain"}
    )
    second = client.responses.create(input=items, **ask)
    assert second.output_text == "It rains."
    assert "<|assistant|><think>hm</think>I look.<tool_call>" in server.engine.prompts[-1]


def test_items_are_named_by_their_ids(spoken: Launch) -> None:
    server = spoken("one", "two")
    client = server.client()
    first = client.responses.create(model="fake-model", input="a")
    said = first.output[0].id
    reference = {"type": "item_reference", "id": said}
    client.responses.create(model="fake-model", input=[reference, {"role": "user", "content": "b"}])
    assert server.engine.prompts[-1] == "<|assistant|>one<|end|><|user|>b<|end|><|assistant|>"
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="fake-model", input=[reference | {"id": "msg_no"}])
    assert caught.value.param == "input[0].id"


class City(BaseModel):
    name: str
    people: int


def test_parse_with_a_model(spoken: Launch) -> None:
    server = spoken('{"name": "Bonn", "people": 3}')
    reply = server.client().responses.parse(model="fake-model", input="x", text_format=City)
    assert reply.output_parsed == City(name="Bonn", people=3)
    (params,) = [params for _, params in server.engine.seen]
    wish = params.structured_outputs
    assert wish is not None and wish.asked_as == "text.format" and not wish.lenient
    assert reply.text.format.type == "json_schema" and reply.text.format.name == "City"


def test_what_is_cut_is_incomplete(spoken: Launch) -> None:
    server = spoken("hello there")
    for stream in (False, True):
        ask: Any = {"model": "fake-model", "input": "x", "max_output_tokens": 2, "stream": stream}
        reply = server.client().responses.create(**ask)
        if stream:
            last = list(reply)[-1]
            assert last.type == "response.incomplete"
            reply = last.response
        assert reply.status == "incomplete" and reply.output_text == "hello "
        assert reply.incomplete_details.reason == "max_output_tokens"
        assert server.client().responses.retrieve(reply.id).status == "incomplete"


def test_log_probabilities(spoken: Launch) -> None:
    server = spoken("abcdef")
    reply = server.client().responses.create(
        model="fake-model", input="x", include=["message.output_text.logprobs"], top_logprobs=2
    )
    entries = reply.output[0].content[0].logprobs
    assert [entry.logprob for entry in entries] == [-0.5, -0.5]
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2]


def test_a_required_call_and_a_named_one(spoken: Launch) -> None:
    server = spoken(CALL)
    for choice in ("required", {"type": "function", "name": "weather"}):
        reply = server.client().responses.create(
            model="fake-model", input="x", tools=[TOOL, {"type": "web_search"}], tool_choice=choice
        )
        assert reply.output[0].type == "function_call" and reply.tools[0].name == "weather"
        wish = server.engine.seen[-1][1].structured_outputs
        assert wish.structural_tag["at_least"] == 1
        server.client().responses.create(  # as instructor sends it: the call's schema twice
            model="fake-model", input="x", tools=[TOOL], tool_choice=choice,
            text={"format": {"type": "json_object"}},
        )  # fmt: skip
        assert server.engine.seen[-1][1].structured_outputs == wish
        assert [tool.type for tool in reply.tools] == ["function"]


def test_what_is_skipped_is_told(spoken: Launch) -> None:
    server = spoken("a")
    tools = [{"type": "web_search"}, {"type": "mcp", "server_label": "x"}, TOOL]
    reply = server.post("/v1/responses", {"input": "x", "tools": tools, "own": 1})
    said = reply.headers["x-ds-cp-warning"]
    assert (
        said == "ignored unknown fields: own; skipped, not served here: tools.web_search, tools.mcp"
    )


def test_in_the_background(spoken: Launch) -> None:
    server = spoken("hello there")
    server.engine.first_delay_s = 0.3
    client = server.client()
    reply = client.responses.create(model="fake-model", input="x", background=True)
    assert reply.status == "in_progress" and reply.background and not reply.output
    busy = client.responses.retrieve(reply.id)
    assert busy.status in ("in_progress", "completed")
    assert wait_for(lambda: client.responses.retrieve(reply.id).status == "completed", 20)
    done = client.responses.retrieve(reply.id)
    assert done.output_text == "hello there" and done.usage.output_tokens == 4
    assert client.responses.cancel(reply.id).status == "completed"  # too late
    after = client.responses.create(model="fake-model", previous_response_id=reply.id, input="y")
    assert after.status == "completed" and "hello there" in server.engine.prompts[-1]


def test_what_runs_in_the_background_can_be_cancelled(spoken: Launch) -> None:
    server = spoken("hello there")
    server.engine.first_delay_s = 60.0
    client = server.client()
    reply = client.responses.create(model="fake-model", input="x", background=True)
    error = error_of(
        server.post("/v1/responses", {"previous_response_id": reply.id, "input": "y"}), 400
    )
    assert error["code"] == "previous_response_in_progress"
    assert client.responses.cancel(reply.id).status == "cancelled"
    assert client.responses.retrieve(reply.id).status == "cancelled"
    assert wait_for(lambda: not server.engine.live)
    other = client.responses.create(model="fake-model", input="x", background=True)
    client.responses.delete(other.id)
    assert wait_for(lambda: not server.engine.live)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(other.id)


def test_a_failure_in_the_background_is_kept(spoken: Launch) -> None:
    server = spoken("hello there")
    server.engine.break_after = (1, EngineDeadError("gone"))
    client = server.client()
    reply = client.responses.create(model="fake-model", input="x", background=True)
    assert wait_for(lambda: client.responses.retrieve(reply.id).status == "failed", 20)
    failed = client.responses.retrieve(reply.id)
    assert failed.error.code == "server_error" and "stopped" in failed.error.message


def test_an_answer_in_the_background_that_outgrows_the_store(spoken: Launch) -> None:
    """It says so when it is asked for, and is not just gone."""
    server = spoken("hello there " * 100, max_stored_response_bytes=6000)
    client = server.client()
    reply = client.responses.create(model="fake-model", input="x", background=True)
    assert wait_for(lambda: client.responses.retrieve(reply.id).status == "failed", 20)
    failed = client.responses.retrieve(reply.id)
    assert "max_stored_response_bytes" in failed.error.message and not failed.output


def test_errors_of_the_protocol(spoken: Launch) -> None:
    server = spoken("a")
    error = error_of(server.get("/v1/responses/resp_no"), 404)
    assert error["code"] == "response_not_found"
    for method, path in (
        ("DELETE", "/v1/responses/resp_no"),
        ("POST", "/v1/responses/resp_no/cancel"),
        ("GET", "/v1/responses/resp_no/input_items"),
    ):
        headers = {"content-type": "application/json"}
        reply = httpx.request(method, server.url + path, headers=headers, timeout=20, verify=False)
        error_of(reply, 404)
    body = {"input": "x", "previous_response_id": "resp_no"}
    error = error_of(server.post("/v1/responses", body), 400)
    assert (error["code"], error["param"]) == (
        "previous_response_not_found",
        "previous_response_id",
    )
    orphan = {"type": "function_call_output", "call_id": "c9", "output": "x"}
    error = error_of(server.post("/v1/responses", {"input": [orphan]}), 400)
    assert error["param"] == "input" and "'c9'" in error["message"]
    error = error_of(server.post("/v1/responses", {"input": "x", "temperature": 9}), 400)
    assert error["param"] == "temperature"
    error = error_of(server.post("/v1/responses", {"input": "x", "max_output_tokens": 0}), 400)
    assert error["param"] == "max_output_tokens"
    error = error_of(server.post("/v1/responses", {"input": "x", "max_output_tokens": 9000}), 400)
    assert error["code"] == "context_length_exceeded" and "8192" in error["message"]
    assert error["param"] == "max_output_tokens"
    error = error_of(server.post("/v1/responses", {"input": "x " * 9000}), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    error = error_of(server.post("/v1/responses", {"input": "x" * 300_000}), 400)  # not tokenized
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    error = error_of(server.post("/v1/responses", {"input": "x", "model": "gpt"}), 404)
    assert error["code"] == "model_not_found"
    reply = server.client().responses.create(model="fake-model", input="x")
    error = error_of(server.get(f"/v1/responses/{reply.id}", params={"stream": True}), 400)
    assert error["param"] == "stream"
    error = error_of(
        httpx.post(f"{server.url}/v1/responses/{reply.id}/cancel", headers=headers, verify=False),
        400,
    )
    assert error["param"] == "background"


def test_a_failing_stream_ends_with_a_failed_response(spoken: Launch) -> None:
    server = spoken("hello there")
    server.engine.break_after = (2, EngineDeadError("gone"))
    events = list(server.client().responses.create(model="fake-model", input="x", stream=True))
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert failed.status == "failed" and failed.error.code == "server_error"
    (said,) = failed.output  # as far as it came
    assert (said.status, said.content[0].text) == ("incomplete", "hello ")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    server.engine.break_after, server.engine.refuse = None, QueueFullError("full")
    for stream in (False, True):  # before the first event it is a status
        with pytest.raises(openai.RateLimitError):
            server.client().responses.create(model="fake-model", input="x", stream=stream)


def test_the_store_is_bounded(spoken: Launch) -> None:
    server = spoken("a", max_stored_responses=2)
    client = server.client()
    ids = [client.responses.create(model="fake-model", input="x").id for _ in range(3)]
    with pytest.raises(openai.NotFoundError, match="max_stored_responses"):
        client.responses.retrieve(ids[0])
    assert client.responses.retrieve(ids[1]).id == ids[1]
    none = spoken("a", max_stored_responses=0)
    reply = none.client().responses.create(model="fake-model", input="x")
    error_of(none.get(f"/v1/responses/{reply.id}"), 404)
    error = error_of(none.post("/v1/responses", {"input": "x", "background": True}), 400)
    assert error["param"] == "background"


def test_a_key_sees_its_own_responses(spoken: Launch) -> None:
    server = spoken("a", api_key=("a" * 20, "b" * 20))
    mine, other = server.client("a" * 20), server.client("b" * 20)
    reply = mine.responses.create(model="fake-model", input="x")
    assert mine.responses.retrieve(reply.id).id == reply.id
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(reply.id)
    with pytest.raises(openai.BadRequestError):
        other.responses.create(model="fake-model", previous_response_id=reply.id, input="y")


def test_pages_of_input_items(spoken: Launch) -> None:
    server = spoken("a")
    client = server.client()
    items: Any = [{"role": "user", "content": f"m{i}"} for i in range(5)]
    reply = client.responses.create(model="fake-model", input=items)
    texts = [item.content[0].text for item in client.responses.input_items.list(reply.id, limit=2)]
    assert texts == ["m4", "m3", "m2", "m1", "m0"]  # the client follows the pages
    page = client.responses.input_items.list(reply.id, limit=2, order="asc")
    assert [item.content[0].text for item in page.data] == ["m0", "m1"] and page.has_more
    error_of(server.get(f"/v1/responses/{reply.id}/input_items", params={"after": "no"}), 400)
    error_of(server.get(f"/v1/responses/{reply.id}/input_items", params={"limit": 0}), 400)


def test_tokens_are_counted_without_an_answer(spoken: Launch) -> None:
    server = spoken("a")
    client = server.client()
    count = client.responses.input_tokens.count(model="fake-model", input="hi there")
    reply = client.responses.create(model="fake-model", input="hi there")
    assert count.input_tokens == reply.usage.input_tokens and len(server.engine.seen) == 1


def test_a_client_that_leaves_ends_its_stream(spoken: Launch) -> None:
    server = spoken("hello there " * 50)
    server.engine.delay_s = 0.05
    stream = server.client().responses.create(model="fake-model", input="x", stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    stream.close()
    assert wait_for(lambda: bool(server.engine.aborted), 20)
