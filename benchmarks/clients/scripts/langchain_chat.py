"""LangChain's client, langchain-openai."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
from checks import ASK_JSON, LONG, STORY, TOOL, Checks, is_call, is_object, raises
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

checks = Checks("langchain-openai", "langchain-core", "openai")
HELLO = "Say hello."
LOOP = asyncio.new_event_loop()  # one for all: the client keeps its connections


def chat(url: str = "", **fields: Any) -> Any:
    fields = {"model": checks.model, "max_tokens": 8, "temperature": 0, "max_retries": 0} | fields
    return ChatOpenAI(
        base_url=url or checks.url, **{"api_key": checks.key, "timeout": 110} | fields
    )


def text(answer: Any) -> str:
    assert isinstance(answer.content, str) and answer.content, answer
    return str(answer.content)


def endless(**fields: Any) -> Any:
    return chat(extra_body={"ignore_eos": True}, **fields)


checks.absent("models listed", why="the client has no list of models")


@checks.check("plain chat")
def _() -> Any:
    answer = chat(checks.through("langchain-chat")).invoke(HELLO)
    assert text(answer) and answer.usage_metadata["output_tokens"] <= 8


@checks.check("system and several turns")
def _() -> Any:
    turns = [
        SystemMessage("Be brief."),
        HumanMessage(HELLO),
        AIMessage("Hello."),
        HumanMessage("?"),
    ]
    text(chat().invoke(turns))
    prompt = ChatPromptTemplate.from_messages([("system", "Be {how}."), ("human", "{ask}")])
    text((prompt | chat()).invoke({"how": "brief", "ask": HELLO}))


@checks.check("developer message")
def _() -> Any:
    text(chat().invoke([{"role": "developer", "content": "Be brief."}, HumanMessage(HELLO)]))


@checks.check("name of a participant")
def _() -> Any:
    text(chat().invoke([HumanMessage(HELLO, name="alice")]))


@checks.check("content in parts")
def _() -> Any:
    parts: list[Any] = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    text(chat().invoke([HumanMessage(parts)]))


@checks.check("earlier answer without text")
def _() -> Any:
    text(chat().invoke([HumanMessage(HELLO), AIMessage(""), HumanMessage(HELLO)]))


@checks.check("stream")
def _() -> Any:
    whole = text(chat().invoke(HELLO))
    url = checks.through("langchain-stream")
    found = "".join(str(chunk.content) for chunk in chat(url).stream(HELLO))
    assert found == whole, (found, whole)


@checks.check("usage in the stream")
def _() -> Any:
    chunks = list(chat(stream_usage=True).stream(HELLO))
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert sum(each["output_tokens"] for each in usage) == 8, usage


@checks.check("max tokens")
def _() -> Any:
    answer = endless(max_tokens=3).invoke(HELLO)
    assert answer.usage_metadata["output_tokens"] == 3
    assert answer.response_metadata["finish_reason"] == "length"


@checks.check("stop")
def _() -> Any:
    word = text(chat().invoke(HELLO)).split()[1]
    answer = chat().invoke(HELLO, stop=[word])
    assert answer.response_metadata["finish_reason"] == "stop" and word not in answer.content


@checks.check("temperature 0, top_p and seed repeat")
def _() -> Any:
    seeded = chat(temperature=1.0, top_p=0.9, seed=7)
    assert text(seeded.invoke(HELLO)) == text(seeded.invoke(HELLO))


@checks.check("log-probabilities")
def _() -> Any:
    answer = chat(logprobs=True, top_logprobs=2).invoke(HELLO)
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"]


@checks.check("several answers")
def _() -> Any:
    made = chat(n=2, temperature=1.0).generate([[HumanMessage(HELLO)]])
    assert len(made.generations[0]) == 2


@checks.check("text completion")
def _() -> Any:
    fields: dict[str, Any] = {"model": checks.model, "max_tokens": 4, "temperature": 0}
    llm = OpenAI(base_url=checks.url, api_key=checks.key, max_retries=0, **fields)
    assert llm.invoke("Gravity is")
    assert "".join(llm.stream("Gravity is"))


@checks.check("async chat")
def _() -> Any:
    answers = LOOP.run_until_complete(chat().abatch([HELLO] * 4))
    assert all(text(answer) for answer in answers)


@checks.check("async stream")
def _() -> Any:
    async def one() -> int:
        return len([chunk async for chunk in chat().astream(HELLO)])

    assert LOOP.run_until_complete(one()) >= 3


@checks.check("no such model")
def _() -> Any:
    return raises(openai.NotFoundError, lambda: chat(model="gpt-nope").invoke(HELLO), "gpt-nope")


@checks.check("context overflow")
def _() -> Any:
    return raises(ContextOverflowError, lambda: chat().invoke(LONG), "maximum context length")


@checks.check("wrong key")
def _() -> Any:
    return raises(openai.AuthenticationError, lambda: chat(api_key="wrong").invoke(HELLO))


@checks.check("value out of range")
def _() -> Any:
    bad = chat(temperature=9)
    return raises(openai.BadRequestError, lambda: bad.invoke(HELLO), "temperature")


for status in ("429", "503"):

    @checks.check(f"retry after {status}", status)
    def _(status: str) -> Any:
        label = f"langchain-{status}"
        text(chat(checks.through(label, f"{status}x1"), max_retries=2).invoke(HELLO))
        assert checks.count(label) == 2
        kind = openai.RateLimitError if status == "429" else openai.InternalServerError
        busy = chat(checks.through(label + "-no", f"{status}x9"))
        return raises(kind, lambda: busy.invoke(HELLO))


@checks.check("error inside a stream")
def _() -> Any:
    cut = endless(url=checks.through("langchain-cut", "events3"), max_tokens=40)
    return raises(openai.APIError, lambda: list(cut.stream(HELLO)), "engine has stopped")


@checks.check("leaving mid-stream")
def _() -> Any:
    stream = endless(max_tokens=600).stream(STORY)
    for _ in zip(range(4), stream, strict=False):
        pass
    checks.busy()
    stream.close()
    checks.idle()


@checks.check("embeddings (not served)")
def _() -> Any:
    settings: dict[str, Any] = {"check_embedding_ctx_length": False, "max_retries": 0}
    made = OpenAIEmbeddings(model=checks.model, base_url=checks.url, api_key=checks.key, **settings)
    return raises(openai.NotFoundError, lambda: made.embed_query("a"), "/v1/embeddings")


@checks.check("tools")
def _() -> Any:
    made = chat(max_tokens=100).bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False)
    (call,) = made.invoke(HELLO).tool_calls
    is_call(call["name"], json.dumps(call["args"]))
    return f"{call['name']}({call['args']})"


@checks.check("JSON output")
def _() -> Any:
    answer = chat(max_tokens=60).bind(response_format={"type": "json_object"}).invoke(ASK_JSON)
    is_object(text(answer), answer.response_metadata["finish_reason"])


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"]


@checks.check("JSON by a schema")
def _() -> Any:
    over = chat(max_tokens=200).with_structured_output(Person, method="json_schema")
    found = over.invoke(ASK_JSON)
    assert isinstance(found, Person), found
    return repr(found)


checks.absent("structured answer by prompt", why="no such mode in this client")
checks.finish()
