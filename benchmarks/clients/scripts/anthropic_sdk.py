"""Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import anthropic
from checks import ASK_JSON, ASK_WEATHER, LONG, STORY, TOOL, Checks, is_call, raises, weather
from pydantic import BaseModel

checks = Checks("anthropic")
USER = {"role": "user", "content": "Say hello."}
ASK = {"role": "user", "content": ASK_WEATHER}
FUNCTION = TOOL["function"]
MINE = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
    "cache_control": {"type": "ephemeral"},
}
FORCED: Any = {
    "tools": [MINE],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "max_tokens": 300,
}
GREEDY = {"temperature": 0}  # the client has no such argument any more


class Person(BaseModel):
    """The client drops limits from a schema, so a field without a list of values might not end."""

    mood: Literal["good", "bad"]
    height: Literal["small", "middle", "tall"]


def made(base: str = "", **settings: Any) -> Any:
    fields = {"api_key": checks.key, "max_retries": 0, "timeout": 110} | settings
    return anthropic.Anthropic(base_url=base or checks.base, **fields)


client = made()


def through(label: str, fault: str = "none", retries: int = 2) -> Any:
    base = checks.through(label, fault).removesuffix("/v1")  # the client says /v1 itself
    return made(base, max_retries=retries, timeout=60)


def fields_of(messages: Any, **fields: Any) -> dict[str, Any]:
    body = GREEDY | fields.pop("extra_body", {})
    given = {"model": checks.model, "max_tokens": 8, "messages": list(messages)}
    return given | fields | {"extra_body": body}


def message(messages: Any = (USER,), over: Any = None, **fields: Any) -> Any:
    return (over or client).messages.create(**fields_of(messages, **fields))


def text(answer: Any) -> str:
    found = "".join(block.text for block in answer.content if block.type == "text")
    assert found, answer
    return found


@checks.check("models listed")
def _() -> Any:
    names = [model.id for model in client.models.list()]
    assert names == [checks.model], names
    assert client.models.retrieve(checks.model).id == checks.model


@checks.check("plain chat")
def _() -> Any:
    answer = message(over=through("anthropic-chat"))
    assert text(answer) and answer.usage.output_tokens <= 8 and answer.role == "assistant"


@checks.check("system and several turns")
def _() -> Any:
    before = {"role": "assistant", "content": "Hello."}
    text(message([USER, before, {"role": "user", "content": "Again?"}], system="Be brief."))


@checks.check("content in parts")
def _() -> Any:
    kept = {"type": "text", "text": "hello.", "cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "Say"}, kept]
    text(message([{"role": "user", "content": parts}], system=[kept]))
    return "in the system's text too, with cache_control"


@checks.check("stream")
def _() -> Any:
    whole = text(message())
    with through("anthropic-stream").messages.stream(**fields_of([USER])) as stream:
        found = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(found) == whole == text(final) and len(found) > 1, found
    kinds = [event.type for event in message(stream=True)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds


@checks.check("usage in the stream")
def _() -> Any:
    with client.messages.stream(**fields_of([USER], extra_body={"ignore_eos": True})) as stream:
        usage = stream.get_final_message().usage
    assert usage.output_tokens == 8, usage
    # Tokens of the prompt that were cached are counted apart.
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) > 0, usage


@checks.check("max tokens")
def _() -> Any:
    answer = message(max_tokens=3, extra_body={"ignore_eos": True})
    assert (answer.usage.output_tokens, answer.stop_reason) == (3, "max_tokens"), answer


@checks.check("stop")
def _() -> Any:
    word = text(message(max_tokens=12)).split()[1]
    answer = message(max_tokens=12, stop_sequences=[word])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", word), answer


@checks.check("temperature 0, top_p and seed repeat")
def _() -> Any:
    same = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    assert text(message(extra_body=same)) == text(message(extra_body=same))
    assert text(message()) == text(message())
    return "by extra_body"


def many() -> Any:
    return anthropic.AsyncAnthropic(base_url=checks.base, api_key=checks.key, timeout=110)


@checks.check("async chat")
def _() -> Any:
    async def several() -> Any:
        async with many() as over:
            return await asyncio.gather(
                *(over.messages.create(**fields_of([USER])) for _ in range(4))
            )

    assert all(text(answer) for answer in asyncio.run(several()))


@checks.check("async stream")
def _() -> Any:
    async def one() -> int:
        async with many() as over, over.messages.stream(**fields_of([USER])) as stream:
            return len([piece async for piece in stream.text_stream])

    assert asyncio.run(one()) >= 3


@checks.check("no such model")
def _() -> Any:
    return raises(anthropic.NotFoundError, lambda: message(model="gpt-nope"), "gpt-nope")


@checks.check("context overflow")
def _() -> Any:
    long = [{"role": "user", "content": LONG}]
    return raises(anthropic.BadRequestError, lambda: message(long), "maximum context length is")


@checks.check("wrong key")
def _() -> Any:
    return raises(anthropic.AuthenticationError, lambda: message(over=made(api_key="wrong")))


@checks.check("value out of range")
def _() -> Any:
    bad = {"temperature": 9}
    return raises(anthropic.BadRequestError, lambda: message(extra_body=bad), "temperature")


for status in ("429", "503"):

    @checks.check(f"retry after {status}", status)
    def _(status: str) -> Any:
        label = f"anthropic-{status}"
        text(message(over=through(label, f"{status}x1")))
        assert checks.count(label) == 2
        kind = anthropic.RateLimitError if status == "429" else anthropic.InternalServerError
        over = through(label + "-no", f"{status}x9", retries=0)
        return raises(kind, lambda: message(over=over))


@checks.check("error inside a stream")
def _() -> Any:
    cut = through("anthropic-cut", "events3", retries=0)
    body = {"ignore_eos": True}
    return raises(
        anthropic.APIError,
        lambda: list(message(over=cut, stream=True, max_tokens=40, extra_body=body)),
        "engine has stopped",
    )


@checks.check("leaving mid-stream")
def _() -> Any:
    story = [{"role": "user", "content": STORY}]
    body = {"ignore_eos": True}
    with client.messages.stream(**fields_of(story, max_tokens=600, extra_body=body)) as stream:
        for _ in zip(range(4), stream.text_stream, strict=False):
            pass
        checks.busy()
    checks.idle()


@checks.check("tools")
def _() -> Any:
    for choice in (FORCED["tool_choice"], {"type": "tool", "name": MINE["name"]}):
        answer = message([ASK], **FORCED | {"tool_choice": choice})
        (call,) = answer.content
        assert (call.type, answer.stop_reason) == ("tool_use", "tool_use"), answer
        is_call(call.name, json.dumps(call.input))
    return f"{call.name}({call.input})"


@checks.check("tools in a stream")
def _() -> Any:
    (whole,) = message([ASK], **FORCED).content
    with client.messages.stream(**fields_of([ASK], **FORCED)) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (call,) = stream.get_final_message().content
    assert call.input == whole.input == json.loads("".join(pieces)), (call, pieces)
    return f"{len(pieces)} pieces"


@checks.check("agent loop")
def _() -> Any:
    messages: list[Any] = [ASK]
    one = {"disable_parallel_tool_use": True}
    for choice in ({"type": "any"} | one, {"type": "auto"} | one, {"type": "none"}):
        answer = message(messages, **FORCED | {"tool_choice": choice})
        messages.append({"role": "assistant", "content": answer.content})
        calls = [block for block in answer.content if block.type == "tool_use"]
        if not calls:
            break
        results: list[Any] = []
        for call in calls:
            is_call(call.name, json.dumps(call.input))
            block = {"type": "tool_result", "tool_use_id": call.id}
            results.append(block | {"content": weather(**call.input)})
        messages.append({"role": "user", "content": results})
    assert len(messages) >= 4 and text(answer), messages
    ran: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: Literal["Oslo", "Bonn"], days: Literal[1, 2]) -> str:
        """The weather of a city in the next days."""
        ran.append(city)
        return weather(city, days)

    fields = fields_of([ASK], tool_choice=FORCED["tool_choice"], max_tokens=300)
    turns = list(client.beta.messages.tool_runner(tools=[get_weather], max_iterations=2, **fields))
    assert len(turns) == 2 and ran, turns
    return f"{len(messages)} messages, and tool_runner"


@checks.check("JSON by a schema")
def _() -> Any:
    asked = fields_of([{"role": "user", "content": ASK_JSON}], max_tokens=300)
    found = client.messages.parse(output_format=Person, **asked).parsed_output
    assert isinstance(found, Person), found
    return repr(found)


@checks.check("JSON by a schema in a stream")
def _() -> Any:
    asked = fields_of([{"role": "user", "content": ASK_JSON}], max_tokens=300)
    with client.messages.stream(output_format=Person, **asked) as stream:
        found = stream.get_final_message().parsed_output
    assert isinstance(found, Person), found
    return repr(found)


@checks.check("message")
def _() -> Any:
    return "all of this column"


@checks.check("tokens counted")
def _() -> Any:
    count = client.messages.count_tokens(model=checks.model, messages=[USER]).input_tokens
    usage = message(max_tokens=1).usage
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0), (count, usage)
    return f"{count} tokens"


checks.rest_absent("nothing of the kind in Anthropic's protocol")
checks.finish()
