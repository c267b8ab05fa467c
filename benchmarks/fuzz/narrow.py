"""Narrows openapi.json to values that the engine takes, so that cases get past the checks.

The standard library alone: schemathesis loads it in an environment of its own.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def _one(**properties: Any) -> Json:
    """An object of these properties, all of them there."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


TEXT: Json = {"type": "string", "maxLength": 20}
NOTHING: Json = {"type": "null"}
MESSAGE = _one(role={"enum": ["user", "assistant"]}, content=TEXT)
MESSAGES: Json = {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 3}
BLOCK = _one(type={"const": "text"}, text=TEXT)
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
FORMATS: list[Any] = [
    None,
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
]
# Fields that mean the same wherever they are.
NARROW: Json = {
    "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 8},
    "max_completion_tokens": NOTHING,
    "max_output_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 8},
    "min_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "best_of": NOTHING,
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 50},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "minimum": 0.1, "maximum": 2},
    "top_logprobs": NOTHING,
    "prompt_logprobs": NOTHING,
    "priority": {"type": "integer", "minimum": -10, "maximum": 10},
    "cache_salt": {"type": ["string", "null"], "maxLength": 20},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**31},
    "stop": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 2},
    "stop_sequences": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 2},
    "stop_token_ids": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}},
    "logit_bias": {"type": "object", "maxProperties": 0},
    "stream_options": NOTHING,
    "messages": MESSAGES,
    "input": {"anyOf": [{"type": "string", "maxLength": 20}, MESSAGES]},
    "instructions": {"type": ["string", "null"], "maxLength": 20},
    "system": {
        "anyOf": [TEXT, {"type": "array", "items": _one(type={"const": "text"}, text=TEXT)}]
    },
    "previous_response_id": NOTHING,
    "chat_template_kwargs": NOTHING,
    "reasoning_effort": NOTHING,
    "reasoning": NOTHING,
    "thinking": NOTHING,
    "continue_final_message": NOTHING,
    "response_format": {"enum": FORMATS},
    "structured_outputs": NOTHING,
    "guided_json": NOTHING,
    "guided_regex": {"enum": [None, "[a-c]{1,3}"]},
    "guided_choice": NOTHING,
    "guided_grammar": NOTHING,
    "text": {
        "enum": [
            *[None, {"format": {"type": "text"}}, {"format": {"type": "json_object"}}],
            {"format": {"type": "json_schema", "name": "person", "schema": PERSON}},
        ]
    },
    "output_config": {"enum": [None, {"format": {"type": "json_schema", "schema": PERSON}}]},
    "include": {"enum": [None, [], ["message.output_text.logprobs"]]},
    "metadata": {"enum": [None, {}, {"a": "b"}]},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 250}},
}
# Protocols by a field that the bodies of one have alone -> a tool in its spelling.
TOOLS: dict[str, Json] = {
    "input": {"type": "function", "name": "f", "parameters": PERSON, "strict": True},
    "system": {"name": "f", "input_schema": PERSON},
    "": {"type": "function", "function": {"name": "f", "parameters": PERSON}},
}


def narrow(raw_schema: Json, model: str) -> None:
    """Narrow the fields of every body in place; ``model`` is the one that the server has."""
    for schema in raw_schema["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" not in properties:
            continue  # a part of a body, which its field narrows
        for name, narrower in NARROW.items():
            if name in properties:
                properties[name] = narrower
        properties["model"] = {"enum": [model, None]}
        if "prompt" in properties and "tokens" not in properties:
            properties["prompt"] = {"type": "string", "minLength": 1, "maxLength": 20}
        if "stream" in properties:
            properties["stream"] = {"type": "boolean"}
            schema["required"] = [*schema.get("required", ()), "stream"]
        if "logprobs" in properties:
            plain = {"type": ["boolean", "null"]}
            count = {"type": ["integer", "null"], "minimum": 0, "maximum": 5}
            properties["logprobs"] = plain if "messages" in properties else count
        if "tools" in properties:
            _narrow_tools(properties)
        if "input" in properties:
            schema["required"] = [*schema.get("required", ()), "input"]


def _narrow_tools(properties: Json) -> None:
    """Tools of the client, offered or forced, in the spelling of the protocol."""
    of = next(name for name in TOOLS if name in properties or not name)
    properties["tools"] = {"enum": [None, [], [TOOLS[of]]]}
    modes: list[Any] = [None, "auto", "none"]
    if of == "system":
        modes = [None, {"type": "auto"}, {"type": "none"}]
    if "tool_choice" in properties:
        properties["tool_choice"] = {"enum": modes}


def add_state(raw_schema: Json) -> None:
    """Add GET /state?once=1, which openapi.json leaves out because without ``once`` it is a stream
    that has no end; who calls it must see to that."""
    picture = _one(at={}, state={}, model={}, max_model_len={}, rates={}, picture={})
    raw_schema["paths"]["/state"] = {
        "get": {
            "parameters": [
                {"name": "once", "in": "query", "required": True, "schema": {"const": True}}
            ],
            "responses": {
                "200": {
                    "description": "One picture.",
                    "content": {"application/json": {"schema": picture}},
                },
                "4XX": raw_schema["paths"]["/version"]["get"]["responses"]["4XX"],
                "5XX": raw_schema["paths"]["/version"]["get"]["responses"]["5XX"],
            },
        }
    }
