"""Instructor: typed answers, by tools, by a schema, and by the prompt alone (its mode MD_JSON)."""

from __future__ import annotations

import asyncio
from typing import Any

import instructor
import openai
from checks import LONG, Checks, chain, raises
from pydantic import BaseModel, Field

checks = Checks("instructor", "openai")
ASK = 'Repeat this JSON and nothing else: {"name": "Ann", "age": 30}'
USER = {"role": "user", "content": ASK}


class Person(BaseModel):
    name: str
    age: int


class Known(BaseModel, extra="forbid"):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


def client(url: str = "", mode: Any = instructor.Mode.MD_JSON, **settings: Any) -> Any:
    settings = {"api_key": checks.key, "max_retries": 0, "timeout": 110} | settings
    return instructor.from_openai(openai.OpenAI(base_url=url or checks.url, **settings), mode=mode)


def create(over: Any, messages: Any = (USER,), **fields: Any) -> Any:
    fields = {"model": checks.model, "max_tokens": 60, "temperature": 0} | fields
    fields = {"response_model": Person, "max_retries": 0} | fields
    return over.chat.completions.create(messages=list(messages), **fields)


def refuse_errors_of_the_server(err: Exception) -> None:
    """Raise what the server caused; an answer that does not parse is the model's fault."""
    if any(isinstance(each, openai.APIError | TimeoutError) for each in chain(err)):
        raise err


def untyped(over: Any, messages: Any, **fields: Any) -> str:
    """An answer as text: what a model of this size says need not parse."""
    answer = create(over, messages, response_model=None, **fields)
    found = answer.choices[0].message.content
    assert isinstance(found, str) and found, answer
    return found


@checks.check("structured answer by prompt")
def _() -> Any:
    try:
        found = create(client(checks.through("instructor-chat")))
    except Exception as err:
        refuse_errors_of_the_server(err)
        return f"asked and answered, but this model's answer did not parse: {type(err).__name__}"
    return f"{found!r}"


@checks.check("plain chat")
def _() -> Any:
    untyped(client(), [USER], max_tokens=8)


@checks.check("system and several turns")
def _() -> Any:
    system = {"role": "system", "content": "Be brief."}
    untyped(client(), [system, USER, {"role": "assistant", "content": "x"}, USER], max_tokens=4)


@checks.check("name of a participant")
def _() -> Any:
    untyped(client(), [USER | {"name": "alice"}], max_tokens=4)


@checks.check("content in parts")
def _() -> Any:
    untyped(client(), [USER | {"content": [{"type": "text", "text": ASK}]}], max_tokens=4)


@checks.check("stream")
def _() -> Any:
    over = client(checks.through("instructor-stream"))
    try:
        fields: dict[str, Any] = {"model": checks.model, "max_tokens": 60, "temperature": 0}
        parts = list(
            over.chat.completions.create_partial(messages=[USER], response_model=Person, **fields)
        )
    except Exception as err:
        refuse_errors_of_the_server(err)
        return f"streamed, but this model's answer did not parse: {type(err).__name__}"
    return f"{len(parts)} partial answers"


@checks.check("usage in the stream")
def _() -> Any:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8}
    chunks = list(create(client(), response_model=None, **fields))
    assert chunks[-1].usage.completion_tokens == 8, chunks[-1]


@checks.check("async chat")
def _() -> Any:
    async def one() -> Any:
        over = openai.AsyncOpenAI(base_url=checks.url, api_key=checks.key, max_retries=0)
        made = instructor.from_openai(over, mode=instructor.Mode.MD_JSON)
        return await made.chat.completions.create(
            model=checks.model, messages=[USER], response_model=None, max_tokens=4
        )

    assert asyncio.run(one()).choices


@checks.check("no such model")
def _() -> Any:
    return raises(Exception, lambda: create(client(), model="gpt-nope"), "gpt-nope")


@checks.check("context overflow")
def _() -> Any:
    long = [{"role": "user", "content": LONG}]
    return raises(Exception, lambda: create(client(), long), "maximum context length is")


@checks.check("wrong key")
def _() -> Any:
    return raises(Exception, lambda: create(client(api_key="wrong")), "API key")


@checks.check("value out of range")
def _() -> Any:
    return raises(Exception, lambda: create(client(), temperature=9), "temperature")


for status in ("429", "503"):

    @checks.check(f"retry after {status}", status)
    def _(status: str) -> Any:
        label = f"instructor-{status}"
        over = client(checks.through(label, f"{status}x1"), max_retries=2)
        untyped(over, [USER], max_tokens=4)
        assert checks.count(label) == 2


def known(mode: Any, messages: Any = (USER,)) -> str:
    found = create(client(mode=mode), messages, response_model=Known, max_tokens=300)
    assert isinstance(found, Known), found
    return repr(found)


def partly(mode: Any) -> str:
    """Partial answers of a stream, of which the last one is whole."""
    fields: dict[str, Any] = {"model": checks.model, "max_tokens": 300, "temperature": 0}
    over = client(mode=mode).chat.completions
    parts = list(over.create_partial(messages=[USER], response_model=Known, **fields))
    Known.model_validate(parts[-1].model_dump())
    assert len(parts) > 2, parts
    return f"{len(parts)} partial answers"


@checks.check("tools")
def _() -> Any:
    return known(instructor.Mode.TOOLS)


@checks.check("tools in a stream")
def _() -> Any:
    return partly(instructor.Mode.TOOLS)


@checks.check("JSON output")
def _() -> Any:
    try:
        found = create(client(mode=instructor.Mode.JSON))
    except Exception as err:
        refuse_errors_of_the_server(err)
        return f"a JSON object, but not of this schema: {type(err).__name__}"
    return f"{found!r}"


@checks.check("JSON by a schema")
def _() -> Any:
    return known(instructor.Mode.JSON_SCHEMA)


@checks.check("JSON by a schema in a stream")
def _() -> Any:
    return partly(instructor.Mode.JSON_SCHEMA)


@checks.check("response with tools")
def _() -> Any:
    over = client(mode=instructor.Mode.RESPONSES_TOOLS)
    found = over.responses.create(
        model=checks.model, input=ASK, response_model=Known, max_output_tokens=300, max_retries=0
    )
    assert isinstance(found, Known), found
    return f"{found!r}"


checks.rest_absent("instructor hands this to the openai client, which has its own column")
checks.finish()
