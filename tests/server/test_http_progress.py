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


def progress_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]


@pytest.mark.parametrize("route", BODIES)
def test_the_last_event_of_a_prompt_says_that_it_is_read(served: Running, route: str) -> None:
    """Whatever the last look has found; and where there was none, for all was cached."""
    served.engine.steps_of_prompt = [PromptProgress(100, 20, done, done / 100) for done in (20, 52)]
    told = progress_of(chunks_of(served, route, return_progress=True))
    assert [one["processed"] for one in told] == [20, 52, 100]
    assert told[-1]["cache"] == 20 and told[-1]["time_ms"] >= 520
    served.engine.cached = 3
    chunks = chunks_of(served, route, return_progress=True)
    whole = served.post(route, BODIES[route]).json()["usage"]["prompt_tokens"]
    [told_once] = progress_of(chunks)
    assert told_once.pop("time_ms") >= 0
    assert told_once == {"total": whole, "cache": 3, "processed": whole}
    at = next(i for i, chunk in enumerate(chunks) if "prompt_progress" in chunk)
    assert at < min(i for i, chunk in enumerate(chunks) if chunk["choices"] and text_of(chunk))


def test_prompts_are_read_one_after_the_other(served: Running) -> None:
    fields = {"prompt": [[5] * 10, [6] * 20], "return_progress": True}
    told = progress_of(chunks_of(served, "/v1/completions", **fields))
    assert [(one["processed"], one["total"]) for one in told] in ([(10, 10), (20, 20)], [(10, 10)])


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
