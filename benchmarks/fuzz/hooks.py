"""Counts every case by route, status and content type. schemathesis loads this file in its own
environment; the counts go to the file that FUZZ_COUNTS names, when it ends. Where FUZZ_MODEL is
set, the schema is first narrowed to values that the engine takes, so that cases get past checks.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections import Counter
from typing import Any

import schemathesis

counts: Counter[tuple[str, int, str]] = Counter()
slowest: dict[str, float] = {}
lock = threading.Lock()


MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string"}},
    "additionalProperties": False,
}
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
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 250}},
}


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    model = os.environ.get("FUZZ_MODEL")
    if not model:
        return
    for schema in raw_schema["components"]["schemas"].values():
        properties = schema.get("properties", {})
        for name, narrow in NARROW.items():
            if name in properties:
                properties[name] = narrow
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


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    kind = (response.headers.get("content-type") or [""])[0].partition(";")[0]
    route = f"{case.method.upper()} {case.operation.path}"
    with lock:
        counts[route, response.status_code, kind] += 1
        slowest[route] = max(slowest.get(route, 0.0), response.elapsed)


@atexit.register
def write() -> None:
    rows = [[*key, count] for key, count in sorted(counts.items())]
    with open(os.environ["FUZZ_COUNTS"], "w") as file:
        json.dump({"rows": rows, "slowest_s": slowest}, file)
