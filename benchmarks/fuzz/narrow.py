"""Narrows openapi.json to values that the engine takes, so that cases get past the checks.

The standard library alone: schemathesis loads it in an environment of its own.
"""

from __future__ import annotations

from typing import Any

MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string"}},
    "additionalProperties": False,
}
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
FORMATS = [
    None,
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
]
NARROW: dict[str, Any] = {
    "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 8},
    "max_completion_tokens": {"type": "null"},
    "min_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "best_of": {"type": "null"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 50},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "minimum": 0.1, "maximum": 2},
    "top_logprobs": {"type": "null"},
    "prompt_logprobs": {"type": "null"},
    "priority": {"type": "integer", "minimum": -10, "maximum": 10},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**31},
    "stop": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 2},
    "stop_token_ids": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}},
    "logit_bias": {"type": "object", "maxProperties": 0},
    "stream_options": {"type": "null"},
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 3},
    "chat_template_kwargs": {"type": "null"},
    "response_format": {"enum": FORMATS},
    "structured_outputs": {"type": "null"},
    "guided_json": {"type": "null"},
    "guided_regex": {"enum": [None, "[a-c]{1,3}"]},
    "guided_choice": {"type": "null"},
    "guided_grammar": {"type": "null"},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 250}},
}


def narrow(raw_schema: dict[str, Any], model: str) -> None:
    """Narrow the fields of every body in place; ``model`` is the one that the server has."""
    for schema in raw_schema["components"]["schemas"].values():
        properties = schema.get("properties", {})
        for name, narrower in NARROW.items():
            if name in properties:
                properties[name] = narrower
        if "model" in properties:
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
