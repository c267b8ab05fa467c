"""Generated requests: every route of openapi.json, all modes and phases of schemathesis, nulls too.

No answer is a 5xx, and none has a status, content type, header or body that openapi.json does not
document. ``make fuzz`` does ten times as many over sockets, with a key and over real ranks.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from benchmarks.fuzz.narrow import narrow
from ds_cp.api.app import create_app
from ds_cp.config import Server
from tests.helpers.fake_engine import FakeEngine

schemathesis = pytest.importorskip(
    "schemathesis", reason="needs schemathesis: pip install '.[test]' on Python 3.11 or newer"
)

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
# The same cases in each run; ``make fuzz`` draws others. DS_CP_TEST_SEED=7 gives others here.
SEED = int(os.environ.get("DS_CP_TEST_SEED", "20261127"))
LENGTH = 64  # tokens of the model, so that no case takes long
LEAST = 1000  # cases of each of the two tests


def settings(seed: int, examples: int) -> dict[str, Any]:
    """schemathesis' settings; ``examples`` random cases for each route and phase that has any."""
    return {
        "seed": seed,
        "suppress-health-check": ["all"],
        "continue-on-failure": True,
        "workers": 1,
        "warnings": False,
        "generation": {
            "mode": "all", "max-examples": examples, "allow-x00": True, "database": "none",
            "no-shrink": True,
        },
        "checks": {"enabled": False} | {name: {"enabled": True} for name in CHECKS},
    }  # fmt: skip


def run(
    app: Any, raw: dict[str, Any], seed: int, examples: int
) -> tuple[Counter[str], set[str], list[str]]:
    """Cases by status, the phases that had any, and what was wrong."""
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import from_schema

    config = SchemathesisConfig.from_dict(settings(seed, examples))
    schema = schemathesis.openapi.from_dict(raw, config=config)
    schema.app = app
    statuses: Counter[str] = Counter()
    phases: set[str] = set()
    wrong: list[str] = []
    for event in from_schema(schema).execute():
        name = type(event).__name__
        if name == "ScenarioFinished":
            recorder = event.recorder
            if recorder.interactions:
                phases.add(event.phase.value)
            for interaction in recorder.interactions.values():
                answer = interaction.response
                statuses[str(answer.status_code) if answer else "none"] += 1
            for case_id, checks in recorder.checks.items():
                for check in checks:
                    if check.failure_info is not None:
                        asked = recorder.interactions[case_id].request
                        wrong.append(f"{asked.method} {asked.uri}: {check.failure_info.failure}")
        elif name in ("NonFatalError", "FatalError", "Interrupted"):
            wrong.append(f"{name}: {getattr(event, 'value', getattr(event, 'exception', ''))}")
    return statuses, phases, wrong


@pytest.mark.parametrize("narrowed", [False, True], ids=["any value", "values in range"])
def test_generated_requests_are_answered_as_documented(tokenizer: Any, narrowed: bool) -> None:
    engine = FakeEngine(tokenizer, LENGTH)
    app = create_app(engine, Server(port=0, allowed_hosts=("testserver",)))
    raw = app.openapi()
    if narrowed:
        narrow(raw, engine.info.model)
    statuses, phases, wrong = run(app, raw, SEED, 60)
    assert not wrong, f"seed {SEED}, {len(wrong)} found:\n" + "\n".join(wrong[:20])
    assert statuses.total() >= LEAST, statuses
    assert set(statuses) <= {"200", "400", "404", "405", "415", "422"}, statuses
    assert statuses["200"] >= LEAST // 5
    assert {"coverage", "fuzzing"} <= phases
    assert not engine.live and engine.state == "ready"


def test_what_is_not_documented_is_found() -> None:
    """An answer of another shape, and a status that nothing speaks of."""
    app = FastAPI()

    @app.get("/number", response_model=None, responses={200: {"model": int}})
    async def number() -> JSONResponse:
        return JSONResponse("five")

    @app.get("/teapot")
    async def teapot() -> JSONResponse:
        return JSONResponse(None, status_code=500)

    statuses, _, wrong = run(app, app.openapi(), SEED, 1)
    assert any("/number: Response violates schema" in line for line in wrong), wrong
    assert any("/teapot: Server error" in line for line in wrong), wrong
    assert any("/teapot: Undocumented status code" in line for line in wrong), wrong
    assert statuses["500"]
