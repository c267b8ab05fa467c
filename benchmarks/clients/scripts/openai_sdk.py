"""OpenAI's own client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import openai_calls
from checks import LONG, STORY, Checks, raises

checks = Checks("openai")
client = openai.OpenAI(base_url=checks.url, api_key=checks.key, max_retries=0, timeout=110)
USER = {"role": "user", "content": "Say hello."}


def chat(messages: Any = (USER,), over: Any = None, **fields: Any) -> Any:
    fields = {"model": checks.model, "max_tokens": 8, "temperature": 0} | fields
    return (over or client).chat.completions.create(messages=list(messages), **fields)


def through(label: str, fault: str = "none", retries: int = 2) -> Any:
    return openai.OpenAI(
        base_url=checks.through(label, fault), api_key=checks.key, max_retries=retries, timeout=60
    )


def text(answer: Any) -> str:
    found = answer.choices[0].message.content
    assert isinstance(found, str) and found, answer
    return found


def streamed(stream: Any) -> tuple[str, Any, str]:
    parts, usage, reason = [], None, ""
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
    assert reason, "no finish reason"
    return "".join(parts), usage, reason


@checks.check("models listed")
def _() -> Any:
    names = [model.id for model in client.models.list()]
    assert names == [checks.model], names
    assert client.models.retrieve(checks.model).id == checks.model


@checks.check("plain chat")
def _() -> Any:
    answer = chat(over=through("openai-chat"))
    assert text(answer) and answer.usage.completion_tokens <= 8


@checks.check("system and several turns")
def _() -> Any:
    system = {"role": "system", "content": "You answer in one word."}
    before = {"role": "assistant", "content": "Hello."}
    text(chat([system, USER, before, {"role": "user", "content": "And again?"}]))


@checks.check("developer message")
def _() -> Any:
    text(chat([{"role": "developer", "content": "Be brief."}, USER]))


@checks.check("name of a participant")
def _() -> Any:
    text(chat([USER | {"name": "alice"}]))


@checks.check("content in parts")
def _() -> Any:
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    text(chat([{"role": "user", "content": parts}]))


@checks.check("earlier answer without text")
def _() -> Any:
    text(chat([USER, {"role": "assistant", "content": None}, USER]))


@checks.check("stream")
def _() -> Any:
    whole = text(chat())
    found, usage, reason = streamed(chat(over=through("openai-stream"), stream=True))
    assert found == whole and reason == "length" and usage is None


@checks.check("usage in the stream")
def _() -> Any:
    _, usage, _ = streamed(chat(stream=True, stream_options={"include_usage": True}))
    assert usage.completion_tokens == 8 and usage.prompt_tokens > 0


@checks.check("max tokens")
def _() -> Any:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model=checks.model, messages=[USER], **{name: 3}, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 3, answer.usage
        assert answer.choices[0].finish_reason == "length"


@checks.check("stop")
def _() -> Any:
    words = text(chat(max_tokens=12)).split()
    answer = chat(max_tokens=12, stop=[words[1]])
    assert answer.choices[0].finish_reason == "stop"
    assert words[1] not in (answer.choices[0].message.content or "")


@checks.check("temperature 0, top_p and seed repeat")
def _() -> Any:
    same = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    assert text(chat(**same)) == text(chat(**same))
    assert text(chat(temperature=0)) == text(chat(temperature=0))


@checks.check("log-probabilities")
def _() -> Any:
    answer = chat(logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in content)


@checks.check("several answers")
def _() -> Any:
    answer = chat(n=2, temperature=1.0, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]


@checks.check("text completion")
def _() -> Any:
    answer = client.completions.create(
        model=checks.model, prompt="Gravity is", max_tokens=4, logprobs=1, temperature=0, echo=True
    )
    assert answer.choices[0].text.startswith("Gravity is")
    assert len(answer.choices[0].logprobs.tokens) >= 5


def many() -> Any:
    return openai.AsyncOpenAI(base_url=checks.url, api_key=checks.key, timeout=110)


@checks.check("async chat")
def _() -> Any:
    async def both() -> Any:
        async with many() as several:
            asked = [
                several.chat.completions.create(model=checks.model, messages=[USER], max_tokens=4)
                for _ in range(4)
            ]
            return await asyncio.gather(*asked)

    assert all(text(answer) for answer in asyncio.run(both()))


@checks.check("async stream")
def _() -> Any:
    async def one() -> int:
        async with many() as several:
            stream = await several.chat.completions.create(
                model=checks.model, messages=[USER], max_tokens=6, stream=True
            )
            return len([chunk async for chunk in stream])

    assert asyncio.run(one()) >= 3


@checks.check("no such model")
def _() -> Any:
    return raises(openai.NotFoundError, lambda: chat(model="gpt-nope"), "gpt-nope")


@checks.check("context overflow")
def _() -> Any:
    try:
        chat([{"role": "user", "content": LONG}])
    except openai.BadRequestError as err:
        assert err.code == "context_length_exceeded", err.code
        assert str(err.body["message"]).startswith("This model's maximum context length is"), err
        return "BadRequestError, code context_length_exceeded"
    raise AssertionError("answered")


@checks.check("wrong key")
def _() -> Any:
    other = client.with_options(api_key="wrong")
    return raises(openai.AuthenticationError, lambda: chat(over=other))


@checks.check("value out of range")
def _() -> Any:
    return raises(openai.BadRequestError, lambda: chat(temperature=9), "temperature")


for status in ("429", "503"):

    @checks.check(f"retry after {status}", status)
    def _(status: str) -> Any:
        label = f"openai-{status}"
        text(chat(over=through(label, f"{status}x1")))
        assert checks.count(label) == 2
        kind = openai.RateLimitError if status == "429" else openai.InternalServerError
        return raises(kind, lambda: chat(over=through(label + "-no", f"{status}x9", retries=0)))


@checks.check("error inside a stream")
def _() -> Any:
    cut = through("openai-cut", "events3", retries=0)
    body = {"ignore_eos": True}
    return raises(
        openai.APIError,
        lambda: streamed(chat(over=cut, stream=True, max_tokens=40, extra_body=body)),
        "engine has stopped",
    )


@checks.check("leaving mid-stream")
def _() -> Any:
    story = [{"role": "user", "content": STORY}]
    body = {"ignore_eos": True}
    with chat(story, stream=True, max_tokens=600, extra_body=body) as stream:
        for _ in zip(range(4), stream, strict=False):
            pass
        checks.busy()
    checks.idle()


@checks.check("embeddings (not served)")
def _() -> Any:
    return raises(
        openai.NotFoundError,
        lambda: client.embeddings.create(model=checks.model, input="a"),
        "/v1/embeddings",
    )


openai_calls.declare(checks, client)
checks.absent("structured answer by prompt", why="no such mode in this client")
checks.absent("message", "tokens counted", why="of Anthropic's protocol")
checks.finish()
