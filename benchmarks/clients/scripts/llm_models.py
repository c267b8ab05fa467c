"""Simon Willison's llm: its Python interface and its command, by extra-openai-models.yaml."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import (
    ASK_JSON,
    ASK_WEATHER,
    LONG,
    STORY,
    TOOL,
    AbsentError,
    Checks,
    is_call,
    is_object,
    raises,
    weather,
)

checks = Checks("llm", "openai")
HELLO = "Say hello."
FOLDER = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(FOLDER)
os.environ["LLM_LOAD_PLUGINS"] = ""  # of all that is installed, the client itself
BASES = {
    "plain": checks.url,
    "recorded": checks.through("llm-chat"),
    "streamed": checks.through("llm-stream"),
    "busy429": checks.through("llm-429", "429x1"),
    "busy503": checks.through("llm-503", "503x1"),
    "cut": checks.through("llm-cut", "events3"),
}


def _entry(name: str, base: str, model: str, **more: str) -> str:
    lines = {"model_id": name, "model_name": model, "api_base": base, "api_key_name": "ds-cp"}
    text = "".join(f"  {key}: {value}\n" for key, value in (lines | more).items())
    return "-" + text[1:]


(FOLDER / "extra-openai-models.yaml").write_text(
    "".join(_entry(name, base, checks.model) for name, base in BASES.items())
    + _entry("missing", checks.url, "gpt-nope")
    + _entry("text", checks.url, checks.model, completion="true")
    + _entry("tools", checks.url, checks.model, supports_tools="true")
    + _entry("responses", checks.url, checks.model, responses="true")
    + _entry("schemas", checks.url, checks.model, supports_schema="true")
)

import llm  # noqa: E402  (it reads the folder above)
from llm.default_plugins.openai_models import Chat  # noqa: E402


def ask(prompt: str = HELLO, model: str = "plain", stream: bool = False, **options: Any) -> Any:
    more = {
        name: options.pop(name) for name in ("system", "key", "tools", "schema") if name in options
    }
    options = {"max_tokens": 8, "temperature": 0} | options
    found = llm.get_model(model)
    return found.prompt(prompt, stream=stream, **{"key": checks.key} | more, **options)


def text(response: Any) -> str:
    found = str(response.text())
    assert found, response.response_json
    return found


def command(*args: str) -> str:
    line = [sys.executable, "-m", "llm", *args]
    done = subprocess.run(line, capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@checks.check("models listed")
def _() -> Any:
    assert "plain" in command("models")
    return "the command lists what the file names; it asks no server"


@checks.check("plain chat")
def _() -> Any:
    assert text(ask(model="recorded"))
    options = ["-o", "max_tokens", "4", "-o", "temperature", "0"]
    assert command("-m", "plain", "--key", checks.key, "--no-stream", *options, HELLO).strip()


@checks.check("system and several turns")
def _() -> Any:
    assert text(ask(system="Be brief."))
    talk = llm.get_model("plain").conversation()
    for _ in range(2):
        assert talk.prompt(HELLO, key=checks.key, stream=False, max_tokens=4).text()


checks.absent("developer message", "name of a participant", why="the client does not send it")


@checks.check("content in parts")
def _() -> Any:
    raise AbsentError("parts are for attachments only")


checks.absent("earlier answer without text", why="the client does not send it")


@checks.check("stream")
def _() -> Any:
    whole = text(ask())
    chunks = list(ask(model="streamed", stream=True))
    assert "".join(chunks) == whole and len(chunks) > 1, chunks
    assert command("-m", "plain", "--key", checks.key, "-o", "max_tokens", "4", HELLO).strip()


@checks.check("usage in the stream")
def _() -> Any:
    response = ask(stream=True)
    list(response)
    assert response.usage().output == 8, response.usage()


@checks.check("max tokens")
def _() -> Any:
    response = ask(STORY, max_tokens=3)
    text(response)
    assert response.usage().output == 3, response.usage()


@checks.check("stop")
def _() -> Any:
    word = text(ask()).split()[1]
    assert word not in ask(stop=word).text()


@checks.check("temperature 0, top_p and seed repeat")
def _() -> Any:
    same: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    assert text(ask(**same)) == text(ask(**same))


@checks.check("log-probabilities")
def _() -> Any:
    response = ask("Gravity is", model="text", logprobs=2, stream=True)
    assert list(response)
    assert response.response_json.get("logprobs"), response.response_json
    return "of completions"


checks.absent("several answers", why="the client asks for one answer")


@checks.check("text completion")
def _() -> Any:
    assert text(ask("Gravity is", model="text"))
    assert list(ask("Gravity is", model="text", stream=True))


@checks.check("async chat")
def _() -> Any:
    async def one() -> str:
        model = llm.get_async_model("plain")
        response = model.prompt(HELLO, key=checks.key, stream=False, max_tokens=4)
        return str(await response.text())

    assert asyncio.run(one())


@checks.check("async stream")
def _() -> Any:
    async def one() -> int:
        model = llm.get_async_model("plain")
        return len([c async for c in model.prompt(HELLO, key=checks.key, max_tokens=6)])

    assert asyncio.run(one()) >= 3


@checks.check("no such model")
def _() -> Any:
    return raises(Exception, lambda: text(ask(model="missing")), "gpt-nope")


@checks.check("context overflow")
def _() -> Any:
    return raises(Exception, lambda: text(ask(LONG)), "maximum context length is")


@checks.check("wrong key")
def _() -> Any:
    return raises(Exception, lambda: text(ask(key="wrong")), "API key")


@checks.check("value out of range")
def _() -> Any:
    return raises(Exception, lambda: text(ask(top_p=1, presence_penalty=-2, seed=-(2**70))), "seed")


for status in ("429", "503"):

    @checks.check(f"retry after {status}", status)
    def _(status: str) -> Any:
        assert text(ask(model=f"busy{status}"))
        assert checks.count(f"llm-{status}") == 2


@checks.check("error inside a stream")
def _() -> Any:
    return raises(
        Exception,
        lambda: list(ask(STORY, model="cut", stream=True, max_tokens=40)),
        "engine has stopped",
    )


@checks.check("leaving mid-stream")
def _() -> Any:
    line = [sys.executable, "-m", "llm", "-m", "plain", "--key", checks.key, STORY]
    with subprocess.Popen([*line, "-o", "max_tokens", "600"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(4)
        checks.busy()
        process.terminate()
        process.wait(10)
    checks.idle()
    return "the command is ended by SIGTERM"


checks.absent("embeddings (not served)", why="the client embeds with OpenAI's own models only")


def get_weather(city: str, days: int) -> str:
    """The weather of a city in the next days."""
    return weather(city[:20], min(max(days, 1), 9))


class OneCall(Chat):
    """A model of a plugin, which must call until there is a result: a small one might not."""

    def build_kwargs(self, prompt: Any, stream: bool) -> dict[str, Any]:
        choice = "none" if prompt.tool_results else "required"
        fields: dict[str, Any] = super().build_kwargs(prompt, stream)
        return fields | {"tool_choice": choice, "parallel_tool_calls": False}


def calling() -> Any:
    fields: dict[str, Any] = {"model_id": "calling", "model_name": checks.model}
    return OneCall(api_base=checks.url, supports_tools=True, **fields)


CITY = llm.Tool(
    name="get_weather",
    description=get_weather.__doc__,
    input_schema=TOOL["function"]["parameters"],
    implementation=get_weather,
)


def chained(stream: bool) -> Any:
    options = {"max_tokens": 300, "temperature": 0}
    more: dict[str, Any] = {"key": checks.key, "options": options, "stream": stream}
    return calling().chain(ASK_WEATHER, tools=[CITY], **more)


@checks.check("tools")
def _() -> Any:
    options: dict[str, Any] = {"max_tokens": 300, "temperature": 0}
    response = calling().prompt(ASK_WEATHER, tools=[CITY], key=checks.key, stream=False, **options)
    (call,) = response.tool_calls()
    is_call(call.name, json.dumps(call.arguments))
    free = ask(model="tools", tools=[get_weather])
    assert free.text() or free.tool_calls(), free.response_json
    return f"{call.name}({call.arguments})"


@checks.check("tools in a stream")
def _() -> Any:
    options: dict[str, Any] = {"max_tokens": 300, "temperature": 0}
    response = calling().prompt(ASK_WEATHER, tools=[CITY], key=checks.key, stream=True, **options)
    list(response)
    (call,) = response.tool_calls()
    is_call(call.name, json.dumps(call.arguments))


@checks.check("agent loop")
def _() -> Any:
    for stream in (False, True):
        said = [
            (response.text(), response.tool_calls()) for response in chained(stream).responses()
        ]
        (_, calls), (answer, more) = said
        assert calls and answer and not more, said
    return "chain(), whole and streamed"


@checks.check("JSON output")
def _() -> Any:
    answer = text(ask(ASK_JSON, json_object=True, max_tokens=60))
    is_object(answer, "length")  # the client does not say why it ended


def typed(stream: bool) -> Any:
    schema = llm.schema_dsl("age int, mood")
    schema["properties"]["age"] |= {"minimum": 0, "maximum": 150}
    schema["properties"]["mood"] |= {"maxLength": 12}
    response = ask(ASK_JSON, model="schemas", stream=stream, schema=schema, max_tokens=300)
    found = json.loads(text(response))
    assert sorted(found) == ["age", "mood"] and 0 <= found["age"] <= 150, found
    return repr(found)


@checks.check("JSON by a schema")
def _() -> Any:
    return typed(stream=False)


@checks.check("JSON by a schema in a stream")
def _() -> Any:
    return typed(stream=True)


@checks.check("response")
def _() -> Any:
    assert text(ask(model="responses")) == text(ask())


@checks.check("response in a stream")
def _() -> Any:
    chunks = list(ask(model="responses", stream=True))
    assert "".join(chunks) == text(ask()) and len(chunks) > 1, chunks


checks.rest_absent("no such thing in this client")
checks.finish()
