"""A real model, of 135 million parameters, calls tools: what must be a call is one, by its schema,
whatever the model knows of tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import openai

from tests.helpers.jobs import command
from tests.launch.conftest import Start, Write

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Oslo in the next 2 days?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def checked(calls: Any) -> list[str]:
    """The names of calls, each of which must be of a tool and by its schema."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert call.id and call.type == "function"
    return [call.function.name for call in calls]


def test_a_small_model_calls_tools(start: Start, config: Write, smollm2: Path) -> None:
    server = {"port": 0, "served_model_name": "small"}
    file = config(model=str(smollm2), kv_cache={"tokens_per_rank": 4096}, server=server)
    job = start(command("ds-cp", "serve", 1, ["--config", file]))
    url = job.ready()
    assert "tool calls are read as json: the chat template knows no tools" in job.out + job.err
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    chat: Any = client.chat.completions
    given: dict[str, Any] = {"model": "small", "messages": ASK, "tools": TOOLS, "max_tokens": 200,
                             "temperature": 0, "parallel_tool_calls": False}  # fmt: skip

    one = chat.create(**given, tool_choice="required").choices[0]
    assert one.finish_reason == "tool_calls" and one.message.content is None
    (name,) = checked(one.message.tool_calls)

    names, pieces, reasons = [], [], []
    for chunk in chat.create(**given, tool_choice="required", stream=True):
        (choice,) = chunk.choices
        for piece in choice.delta.tool_calls or []:
            names += [piece.function.name] if piece.function.name else []
            pieces.append(piece.function.arguments)
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (names, reasons) == ([name], ["tool_calls"])
    assert "".join(pieces) == one.message.tool_calls[0].function.arguments

    hot = given | {"temperature": 1.0, "seed": 7, "n": 2, "logprobs": True}
    for choice in chat.create(**hot, tool_choice=NAMED).choices:
        assert checked(choice.message.tool_calls) == ["get_weather"]
        assert choice.logprobs.content and choice.finish_reason == "tool_calls"

    result = {"role": "tool", "tool_call_id": one.message.tool_calls[0].id, "content": "Rain."}
    history = [*ASK, one.message.model_dump(exclude_none=True), result]
    told = chat.create(**given | {"messages": history, "max_tokens": 8}, tool_choice="none")
    assert told.choices[0].message.content and not told.choices[0].message.tool_calls

    free = chat.create(**given | {"max_tokens": 8}, tool_choice="auto").choices[0]
    assert free.finish_reason in ("length", "stop", "tool_calls")
