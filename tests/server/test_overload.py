"""What clients and load balancers are told while the server is full, mends itself, or gives a
request up."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from ds_cp.engine.interface import EngineHealth
from ds_cp.errors import LongWaitError, QueueFullError
from ds_cp.outputs import STEPS_FAIL, prompt_digest
from tests.helpers.fake_engine import FakeEngine
from tests.server.conftest import PATIENCE_S, Running

HI = [{"role": "user", "content": "Hi"}]
PROTOCOLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 3},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 3},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": HI, "max_tokens": 3, "model": "fake-model"},
}


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        ("starting", 503, 503), ("ready", 200, 200), ("recovering", 200, 503),
        ("stalled", 503, 503), ("stopping", 503, 503), ("dead", 503, 503),
    ],
)  # fmt: skip
def test_health_and_ready_in_each_state(
    state: str, health: int, ready: int, launch: Any, tokenizer: Any
) -> None:
    server: Running = launch(FakeEngine(tokenizer))
    server.engine.state = state
    for path, status in (("/health", health), ("/ready", ready)):
        reply = server.get(path)
        assert (reply.status_code, reply.json()) == (status, {"status": state})


def test_overloaded_and_smaller_is_still_well(launch: Any, tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer)
    server = launch(engine)
    engine.overloaded, engine.away = True, (1,)
    assert engine.health == EngineHealth("ready", True, (1,))
    for path in ("/health", "/ready"):
        reply = server.get(path)
        assert reply.status_code == 200
        assert reply.json() == {"status": "ready", "overloaded": True, "ranks_away": [1]}


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_refusal_costs_no_token(
    path: str, launch: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the prompt is rendered or tokenized, whole and streamed; in the protocol's shape."""
    engine = FakeEngine(tokenizer)
    server = launch(engine)
    monkeypatch.setattr(type(engine.chat_template), "render", _never)
    monkeypatch.setattr("ds_cp.api.tokenization._encode", _never)
    engine.refuses_early = True
    for err, code in (
        (QueueFullError("256 requests are waiting; try again in 7 s", 7), "queue_full"),
        (LongWaitError("700 s would pass; try again in 7 s", 7), "queue_wait_too_long"),
    ):
        engine.refuse = err
        for stream in (False, True):
            reply = server.post(path, PROTOCOLS[path] | {"stream": stream})
            assert reply.status_code == 429 and reply.headers["retry-after"] == "7"
            error = reply.json()["error"]
            assert error["type"] == "rate_limit_error" and "try again in 7 s" in error["message"]
            if path != "/v1/messages":
                assert error["code"] == code
    assert engine.seen == []


@pytest.mark.parametrize("path", PROTOCOLS)
def test_who_waits_for_ranks_that_meet_again_is_kept_waiting(
    path: str, launch: Any, tokenizer: Any
) -> None:
    """Streams get keep-alives, before and between tokens; others wait; all are answered whole."""
    engine = FakeEngine(tokenizer)
    server = launch(engine, keep_alive_s=0.1)
    engine.state = "recovering"
    engine.first_delay_s, engine.delay_s = 0.5, 0.5
    whole: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: whole.append(server.post(path, PROTOCOLS[path])))
    waiting.start()
    body = PROTOCOLS[path] | {"stream": True}
    with httpx.stream(
        "POST", server.url + path, json=body, timeout=PATIENCE_S, verify=False
    ) as reply:
        lines = list(reply.iter_lines())
    mark = "event: ping" if path == "/v1/messages" else ": keep-alive"
    assert lines.count(mark) >= 3, lines
    assert "error" not in {line.split('"')[1] for line in lines if line.startswith('data: {"')}
    waiting.join(PATIENCE_S)
    assert whole[0].status_code == 200


def _never(*args: object, **rest: object) -> None:
    raise AssertionError("a refused request was read")


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_request_whose_steps_fail_is_told(path: str, launch: Any, tokenizer: Any) -> None:
    """Its clients are told not to try again, which would stop the ranks twice more."""
    engine = FakeEngine(tokenizer)
    server = launch(engine)
    engine.end, engine.end_cause = "error", STEPS_FAIL
    reply = server.post(path, PROTOCOLS[path])
    error = reply.json()["error"]
    assert reply.status_code == 500 and reply.headers["x-should-retry"] == "false"
    digest = prompt_digest(engine.seen[0][0])
    assert f"sha256 {digest}" in error["message"]
    if path == "/v1/messages":
        assert error["type"] == "api_error"
    else:
        assert error["code"] == "request_steps_fail"
    said = server.post(path, PROTOCOLS[path] | {"stream": True}).text
    assert digest in said
