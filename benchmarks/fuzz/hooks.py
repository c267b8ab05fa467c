"""Counts every case by route, status and content type. schemathesis loads this file in its own
environment; the counts go to the file that FUZZ_COUNTS names, when it ends. Where FUZZ_MODEL is
set, the schema is first narrowed to values that the engine takes, so that cases get past checks.
Every other id of a response is of one that is kept: nothing else would find any.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections import Counter, deque
from pathlib import Path
from typing import Any

import schemathesis

sys.path.insert(0, str(Path(__file__).parent))
from narrow import add_state, narrow  # noqa: E402 (ds_cp is not in this environment)

JSON = "application/json"
counts: Counter[tuple[str, int, str]] = Counter()
slowest: dict[str, float] = {}
kept: deque[str] = deque(maxlen=50)  # ids of responses that the server gave
asked = 0  # ids that cases had
lock = threading.Lock()


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    add_state(raw_schema)
    if model := os.environ.get("FUZZ_MODEL"):
        narrow(raw_schema, model)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    if case.operation.path == "/state":  # what it may say besides stays
        case.query = (case.query or {}) | {"once": "1"}
    if "response_id" in (case.path_parameters or {}):
        use_kept(case)


def use_kept(case: Any) -> None:
    """Put the id of a response that the server has into every other case; one that is deleted is
    not used again."""
    global asked
    with lock:
        asked += 1
        if kept and asked % 2:
            kept.rotate(1)
            name = kept.pop() if case.method.upper() == "DELETE" else kept[0]
            case.path_parameters = {**case.path_parameters, "response_id": name}


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    kind = (response.headers.get("content-type") or [""])[0].partition(";")[0]
    route = f"{case.method.upper()} {case.operation.path}"
    with lock:
        if route == "POST /v1/responses" and (response.status_code, kind) == (200, JSON):
            kept.append(response.json()["id"])
        counts[route, response.status_code, kind] += 1
        slowest[route] = max(slowest.get(route, 0.0), response.elapsed)


@atexit.register
def write() -> None:
    rows = [[*key, count] for key, count in sorted(counts.items())]
    with open(os.environ["FUZZ_COUNTS"], "w") as file:
        json.dump({"rows": rows, "slowest_s": slowest}, file)
