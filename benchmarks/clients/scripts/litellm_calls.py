"""LiteLLM, by its provider "openai"; single checks also use "hosted_vllm" and "anthropic"."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import litellm
from checks import (
    ASK_JSON,
    ASK_WEATHER,
    LONG,
    STORY,
    TOOL,
    Checks,
    is_call,
    is_object,
    raises,
    weather,
)
from person import Person

checks = Checks("litellm", "openai")
litellm.suppress_debug_info = True
USER = {"role": "user", "content": "Say hello."}
TELL = {"role": "user", "content": STORY}
MODEL = f"openai/{checks.model}"


def chat(messages: Any = (USER,), url: str = "", **fields: Any) -> Any:
    fields = {"model": MODEL, "max_tokens": 8, "temperature": 0, "num_retries": 0} | fields
    fields = {"api_key": checks.key, "timeout": 110} | fields
    return litellm.completion(messages=list(messages), api_base=url or checks.url, **fields)


def text(answer: Any) -> str:
    found = answer.choices[0].message.content
    assert isinstance(found, str) and found, answer
    return found


@checks.check("models listed")
def _() -> Any:
    found = litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=checks.base,
        api_key=checks.key,
    )
    assert any(checks.model in name for name in found), found


@checks.check("plain chat")
def _() -> Any:
    answer = chat(url=checks.through("litellm-chat"))
    assert text(answer) and answer.usage.completion_tokens <= 8
    assert text(chat(model=f"hosted_vllm/{checks.model}"))


@checks.check("system and several turns")
def _() -> Any:
    system = {"role": "system", "content": "Be brief."}
    text(chat([system, USER, {"role": "assistant", "content": "Hello."}, USER]))


@checks.check("developer message")
def _() -> Any:
    text(chat([{"role": "developer", "content": "Be brief."}, USER]))


@checks.check("name of a participant")
def _() -> Any:
    text(chat([USER | {"name": "alice"}]))


@checks.check("content in parts")
def _() -> Any:
    kept = {"type": "text", "text": "hello.", "cache_control": {"type": "ephemeral"}}
    text(chat([{"role": "user", "content": [{"type": "text", "text": "Say"}, kept]}]))
    return "one part with cache_control"


@checks.check("earlier answer without text")
def _() -> Any:
    text(chat([USER, {"role": "assistant", "content": None}, USER]))


@checks.check("stream")
def _() -> Any:
    whole = text(chat())
    chunks = list(chat(stream=True, url=checks.through("litellm-stream")))
    found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert found == whole, (found, whole)


@checks.check("usage in the stream")
def _() -> Any:
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    usage = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert usage[-1].completion_tokens == 8, usage


@checks.check("max tokens")
def _() -> Any:
    for name in ("max_tokens", "max_completion_tokens"):
        limits = {"max_tokens": None} | {name: 3}
        answer = chat([TELL], **limits)
        assert answer.usage.completion_tokens == 3, (name, answer.usage)


@checks.check("stop")
def _() -> Any:
    word = text(chat()).split()[1]
    answer = chat(stop=[word])
    assert answer.choices[0].finish_reason == "stop"
    assert word not in (answer.choices[0].message.content or "")


@checks.check("temperature 0, top_p and seed repeat")
def _() -> Any:
    same: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    assert text(chat(**same)) == text(chat(**same))


@checks.check("log-probabilities")
def _() -> Any:
    answer = chat(logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens


@checks.check("several answers")
def _() -> Any:
    assert len(chat(n=2, temperature=1.0).choices) == 2


@checks.check("text completion")
def _() -> Any:
    over: Any = {"api_base": checks.url, "api_key": checks.key, "prompt": "Gravity is"}
    model = f"text-completion-openai/{checks.model}"
    assert litellm.text_completion(model=model, max_tokens=4, **over).choices[0].text


def later(**fields: Any) -> Any:
    over: Any = {"api_base": checks.url, "api_key": checks.key, "messages": [USER]}
    return litellm.acompletion(model=MODEL, max_tokens=6, **over, **fields)


@checks.check("async chat")
def _() -> Any:
    async def several() -> Any:
        return await asyncio.gather(*(later() for _ in range(4)))

    assert all(text(answer) for answer in asyncio.run(several()))


@checks.check("async stream")
def _() -> Any:
    async def one() -> int:
        return len([chunk async for chunk in await later(stream=True)])

    assert asyncio.run(one()) >= 3


@checks.check("no such model")
def _() -> Any:
    return raises(litellm.NotFoundError, lambda: chat(model="openai/gpt-nope"), "gpt-nope")


@checks.check("context overflow")
def _() -> Any:
    long = [{"role": "user", "content": LONG}]
    return raises(litellm.ContextWindowExceededError, lambda: chat(long))


@checks.check("wrong key")
def _() -> Any:
    return raises(litellm.AuthenticationError, lambda: chat(api_key="wrong"))


@checks.check("value out of range")
def _() -> Any:
    return raises(litellm.BadRequestError, lambda: chat(temperature=9), "temperature")


for status in ("429", "503"):

    @checks.check(f"retry after {status}", status)
    def _(status: str) -> Any:
        label = f"litellm-{status}"
        text(chat(url=checks.through(label, f"{status}x1"), num_retries=2))
        assert checks.count(label) == 2
        kinds = (litellm.RateLimitError, litellm.ServiceUnavailableError)
        url = checks.through(label + "-no", f"{status}x9")
        return raises(kinds[status == "503"], lambda: chat(url=url))


@checks.check("error inside a stream")
def _() -> Any:
    url = checks.through("litellm-cut", "events3")
    over: dict[str, Any] = {"url": url, "stream": True, "max_tokens": 40}
    return raises(Exception, lambda: list(chat([TELL], **over)), "engine has stopped")


@checks.check("leaving mid-stream")
def _() -> Any:
    async def one() -> None:
        stream = await litellm.acompletion(
            model=MODEL,
            messages=[TELL],
            api_base=checks.url,
            api_key=checks.key,
            max_tokens=600,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 4:
                break
        await asyncio.to_thread(checks.busy)
        await stream.aclose()
        await asyncio.to_thread(checks.idle)

    asyncio.run(one())


@checks.check("embeddings (not served)")
def _() -> Any:
    over: Any = {"api_base": checks.url, "api_key": checks.key, "max_retries": 0}
    made = partial(litellm.embedding, model=MODEL, input=["a"], **over)
    return raises(litellm.NotFoundError, made, "/v1/embeddings")


FORCED: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
ASK = {"role": "user", "content": ASK_WEATHER}


@checks.check("tools")
def _() -> Any:
    (call,) = chat([ASK], **FORCED, max_tokens=300).choices[0].message.tool_calls
    is_call(call.function.name, call.function.arguments)
    return f"{call.function.name}({call.function.arguments})"


@checks.check("tools in a stream")
def _() -> Any:
    chunks = list(chat([ASK], **FORCED, max_tokens=300, stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=[ASK])
    (call,) = whole.choices[0].message.tool_calls
    is_call(call.function.name, call.function.arguments)
    pieces = sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks)
    assert pieces > 1 and whole.choices[0].finish_reason == "tool_calls", whole
    return f"{pieces} pieces"


@checks.check("agent loop")
def _() -> Any:
    messages: list[Any] = [ASK]
    for choice in ("required", "auto", "none"):  # a small model might call for ever
        fields = FORCED | {"tool_choice": choice, "max_tokens": 300}
        message = chat(messages, **fields).choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            is_call(call.function.name, call.function.arguments)
            result = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not message.tool_calls:
            break
    assert len(messages) >= 4 and message.content, messages
    return f"{len(messages)} messages"


@checks.check("JSON output")
def _() -> Any:
    asked = [{"role": "user", "content": ASK_JSON}]
    answer = chat(asked, response_format={"type": "json_object"}, max_tokens=60)
    is_object(text(answer), answer.choices[0].finish_reason)


TYPED: Any = {"response_format": Person, "max_tokens": 300}


@checks.check("JSON by a schema")
def _() -> Any:
    asked = [{"role": "user", "content": ASK_JSON}]
    return repr(Person.model_validate_json(text(chat(asked, **TYPED))))


@checks.check("JSON by a schema in a stream")
def _() -> Any:
    chunks = chat([{"role": "user", "content": ASK_JSON}], **TYPED, stream=True)
    found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return repr(Person.model_validate_json(found))


def respond(asked: Any = "Say hello.", **fields: Any) -> Any:
    # The client never asks for fewer than 16 tokens here.
    fields = {"model": MODEL, "max_output_tokens": 16, "temperature": 0, "timeout": 110} | fields
    return litellm.responses(input=asked, api_base=checks.url, api_key=checks.key, **fields)


def said(answer: Any) -> str:
    (item,) = (item for item in answer.output if item.type == "message")
    return "".join(part.text for part in item.content)


@checks.check("response")
def _() -> Any:
    found, expected = said(respond()), text(chat(max_tokens=16))
    assert found == expected, (found, expected)


@checks.check("response in a stream")
def _() -> Any:
    events = list(respond(stream=True))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == said(respond()) and len(deltas) > 1, events


@checks.check("response with tools")
def _() -> Any:
    flat = {"type": "function"} | TOOL["function"]
    answer = respond(ASK_WEATHER, **FORCED | {"tools": [flat]}, max_output_tokens=300)
    (call,) = (item for item in answer.output if item.type == "function_call")
    is_call(call.name, call.arguments)


@checks.check("response by a schema")
def _() -> Any:
    found = said(respond(ASK_JSON, text_format=Person, max_output_tokens=300))
    return repr(Person.model_validate_json(found))


@checks.check("message")
def _() -> Any:
    over: Any = {"model": f"anthropic/{checks.model}", "url": checks.base}
    assert text(chat(**over)) == text(chat())
    (call,) = chat([ASK], **over, **FORCED, max_tokens=300).choices[0].message.tool_calls
    is_call(call.function.name, call.function.arguments)
    chunks = list(chat(stream=True, **over))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text(chat()), chunks
    return "by its provider anthropic"


checks.rest_absent("no such thing in this client")
checks.finish()
