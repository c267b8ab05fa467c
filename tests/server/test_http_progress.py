"""llama.cpp's fields: how far a prompt has come, and times in every chunk."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ds_cp.outputs import PromptProgress
from tests.server.conftest import Running

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5] * 100, "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}


def chunks_of(served: Running, route: str, **fields: Any) -> list[dict[str, Any]]:
    reply = served.post(route, {**BODIES[route], "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if "data: " in line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize("route", BODIES)
def test_a_prompt_on_its_way(served: Running, route: str) -> None:
    steps = [PromptProgress(100, 20, done, done / 100) for done in (20, 52, 52, 100)]
    served.engine.steps_of_prompt = list(steps)
    chunks = chunks_of(served, route, return_progress=True)
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert told == [
        {"total": 100, "cache": 20, "processed": done, "time_ms": 10 * done}
        for done in (20, 52, 100)
    ]
    at = [i for i, chunk in enumerate(chunks) if "prompt_progress" in chunk]
    texts = [i for i, chunk in enumerate(chunks) if chunk["choices"] and text_of(chunk)]
    assert max(at) < min(texts) and all(chunks[i]["choices"] == [] for i in at)
    assert not any("prompt_progress" in chunk for chunk in chunks_of(served, route))


def text_of(chunk: dict[str, Any]) -> str:
    choice = chunk["choices"][0]
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


@pytest.mark.parametrize("route", BODIES)
def test_times(served: Running, route: str) -> None:
    served.engine.cached = 4
    chunks = chunks_of(served, route, timings_per_token=True)
    times = [chunk["timings"] for chunk in chunks]
    assert [t["predicted_n"] for t in times if t["predicted_n"]] == sorted(
        t["predicted_n"] for t in times if t["predicted_n"]
    )
    last = times[-1]
    whole = served.post(route, {**BODIES[route], "timings_per_token": True}).json()
    for found in (last, whole["timings"]):
        assert found["predicted_n"] == 3 and found["cache_n"] == 4
        assert found["prompt_n"] == whole["usage"]["prompt_tokens"] - 4
        assert found["prompt_ms"] > 0 and found["predicted_ms"] >= 0
        per_token = found["prompt_ms"] / found["prompt_n"]
        assert found["prompt_per_token_ms"] == pytest.approx(per_token, abs=2e-3)
    assert "timings" not in served.post(route, BODIES[route]).json()


@pytest.mark.parametrize("field", ["return_progress", "timings_per_token"])
@pytest.mark.parametrize("route", BODIES)
def test_bad_values(served: Running, route: str, field: str) -> None:
    reply = served.post(route, {**BODIES[route], field: "often"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field
