"""LangChain's client, langchain-openai, and agents of langchain over it."""

from __future__ import annotations

import asyncio
import json
from functools import reduce
from operator import add
from typing import Any

import openai
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
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from person import Person
from pydantic import BaseModel, Field

checks = Checks("langchain-openai", "langchain", "langchain-core", "openai")
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


FORCED: dict[str, Any] = {"tool_choice": "any", "parallel_tool_calls": False}


@checks.check("tools")
def _() -> Any:
    for choice in ("any", TOOL["function"]["name"]):
        made = chat(max_tokens=300).bind_tools([TOOL], **FORCED | {"tool_choice": choice})
        (call,) = made.invoke(ASK_WEATHER).tool_calls
        is_call(call["name"], json.dumps(call["args"]))
    return f"{call['name']}({call['args']})"


@checks.check("tools in a stream")
def _() -> Any:
    made = chat(max_tokens=300).bind_tools([TOOL], **FORCED)
    chunks = list(made.stream(ASK_WEATHER))
    whole = reduce(add, chunks)
    (call,) = whole.tool_calls
    is_call(call["name"], json.dumps(call["args"]))
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 1, chunks
    assert call["args"] == made.invoke(ASK_WEATHER).tool_calls[0]["args"]
    return f"{len(chunks)} chunks"


class Place(BaseModel, extra="forbid"):
    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=9)


@wrap_model_call
def one_call_at_least(request: Any, handler: Any) -> Any:
    """A small model calls if it must, and might call for ever, or add arguments for ever."""
    results = sum(isinstance(message, ToolMessage) for message in request.messages)
    choice = ("any", "auto", "none")[min(results, 2)]
    settings = request.model_settings | {"parallel_tool_calls": False, "strict": True}
    return handler(request.override(tool_choice=choice, model_settings=settings))


def agent(**fields: Any) -> Any:
    @tool(args_schema=Place)
    def get_weather(city: str, days: int) -> str:
        """The weather of a city in the next days."""
        return weather(city, days)

    over = chat(max_tokens=300, **fields)
    return create_agent(over, tools=[get_weather], middleware=[one_call_at_least])


def ran(messages: Any) -> str:
    """Assert that an agent called its tool and then answered."""
    kinds = [message.type for message in messages]
    assert kinds[:4] == ["human", "ai", "tool", "ai"] and kinds[-1] == "ai", kinds
    assert messages[2].content.startswith("Rain in "), messages[2]
    assert messages[-1].text and not messages[-1].tool_calls, messages[-1]
    return f"create_agent: {', '.join(kinds)}"


@checks.check("agent loop")
def _() -> Any:
    asked = {"messages": [HumanMessage(ASK_WEATHER)]}
    found = ran(agent().invoke(asked)["messages"])
    streamed = list(agent().stream(asked, stream_mode=["messages", "values"]))
    ran([value for mode, value in streamed if mode == "values"][-1]["messages"])
    tokens = [value for mode, value in streamed if mode == "messages"]
    assert len(tokens) > 4, tokens
    return found


@checks.check("JSON output")
def _() -> Any:
    answer = chat(max_tokens=60).bind(response_format={"type": "json_object"}).invoke(ASK_JSON)
    is_object(text(answer), answer.response_metadata["finish_reason"])


def typed(method: str, **fields: Any) -> Any:
    return chat(max_tokens=300, **fields).with_structured_output(Person, method=method)


@checks.check("JSON by a schema")
def _() -> Any:
    for method in ("json_schema", "function_calling"):
        found = typed(method).invoke(ASK_JSON)
        assert isinstance(found, Person), found
    return repr(found)


@checks.check("JSON by a schema in a stream")
def _() -> Any:
    found = list(typed("json_schema").stream(ASK_JSON))
    assert isinstance(found[-1], Person), found
    return f"{len(found)} chunks"


def respond(**fields: Any) -> Any:
    return chat(use_responses_api=True, **fields)


@checks.check("response")
def _() -> Any:
    answer = respond().invoke(HELLO)
    assert answer.text and answer.id.startswith("resp_"), answer
    assert answer.text == text(chat().invoke(HELLO))


@checks.check("response in a stream")
def _() -> Any:
    chunks = list(respond().stream(HELLO))
    assert reduce(add, chunks).text == respond().invoke(HELLO).text and len(chunks) > 2, chunks


@checks.check("response with tools")
def _() -> Any:
    asked = {"messages": [HumanMessage(ASK_WEATHER)]}
    return ran(agent(use_responses_api=True).invoke(asked)["messages"])


@checks.check("response by a schema")
def _() -> Any:
    found = typed("json_schema", use_responses_api=True).invoke(ASK_JSON)
    assert isinstance(found, Person), found
    return repr(found)


checks.rest_absent("no such thing in this client")
checks.finish()
