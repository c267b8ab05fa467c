"""Counts every case by route, status and content type. schemathesis loads this file in its own
environment; the counts go to the file that FUZZ_COUNTS names, when it ends. Where FUZZ_MODEL is
set, the schema is first narrowed to values that the engine takes, so that cases get past checks.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis

sys.path.insert(0, str(Path(__file__).parent))
from narrow import add_state, narrow  # noqa: E402 (ds_cp is not in this environment)

counts: Counter[tuple[str, int, str]] = Counter()
slowest: dict[str, float] = {}
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
