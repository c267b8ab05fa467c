"""HTTP answers are counted by route and status, and each error has a line that quotes nobody."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from ds_cp.api.app import create_app
from ds_cp.api.transport.answer_log import BURST, PER_S, AnswerLog
from ds_cp.config import Server
from tests.helpers.fake_engine import FakeEngine, make_tokenizer

PATHS = ("/", "/v1/models", "/v1/models/{id}", "/ranks/{rank}/drain", "/health")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Logged:
    """The layer over an application that answers with ``status`` and says that it ``refused``."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, int]] = Counter()
        self.lines: list[str] = []
        self.clock = Clock()
        self.layer = AnswerLog(
            self._app, PATHS, self._count, self.lines.append, ("/health",), self.clock
        )
        self.status = 200
        self.refused: tuple[str | None, str | None] = (None, None)

    def _count(self, *answer: Any) -> None:
        self.counts[answer] += 1

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"request_id": "r1", "refused": self.refused}
        await send({"type": "http.response.start", "status": self.status, "headers": []})

    def ask(self, path: str, status: int = 200, method: str = "GET") -> None:
        async def send(message: Message) -> None:
            pass

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        self.status = status
        asyncio.run(self.layer({"type": "http", "method": method, "path": path}, receive, send))


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/", "/"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/v1/models/a.b", "/v1/models/{id}"),
        ("/v1/models/a/b", "other"),
        ("/ranks/3/drain", "/ranks/{rank}/drain"),
        ("/v1/modelsx", "other"),
        ("/wp-admin", "other"),
        ("//", "/"),
    ],
)
def test_a_path_is_counted_as_its_route(path: str, route: str) -> None:
    logged = Logged()
    logged.ask(path)
    assert logged.counts == {("GET", route, 200): 1}


def test_methods_that_are_unknown_are_one() -> None:
    logged = Logged()
    for method in ("BREW", "PROPFIND"):
        logged.ask("/v1/models", 405, method)
    assert logged.counts == {("other", "/v1/models", 405): 2}


def test_an_error_is_told_by_its_field_and_code() -> None:
    logged = Logged()
    logged.refused = ("messages[2].content", "invalid_value")
    logged.ask("/v1/models", 400)
    assert logged.lines == ["400 for GET /v1/models: invalid_value messages[2].content; request r1"]
    logged.refused = ("what a user\nwrote", None)  # a name of no field of ours
    logged.ask("/v1/models", 400)
    assert logged.lines[1] == "400 for GET /v1/models; request r1"
    for path, status in (("/v1/models", 200), ("/nowhere", 404), ("/health", 503)):
        logged.ask(path, status)
    assert len(logged.lines) == 2
    assert logged.counts == {
        ("GET", "/v1/models", 400): 2, ("GET", "/v1/models", 200): 1, ("GET", "other", 404): 1,
    }  # fmt: skip


def test_lines_are_bounded_and_none_is_lost_without_a_word() -> None:
    logged = Logged()
    for _ in range(BURST + 7):
        logged.ask("/v1/models", 400)
    assert len(logged.lines) == BURST
    logged.clock.now += 1 / PER_S
    logged.ask("/v1/models", 400)
    assert logged.lines[-1].endswith("request r1; 7 more before it")
    logged.clock.now += 3600
    for _ in range(BURST + 1):
        logged.ask("/v1/models", 400)
    assert len(logged.lines) == 2 * BURST + 1
    assert logged.counts["GET", "/v1/models", 400] == 2 * BURST + 9


def test_the_application_counts_and_tells(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(make_tokenizer())
    app = create_app(engine, Server(allowed_hosts=["testserver"]), log_requests=True)
    with TestClient(app) as client:
        engine.state = "starting"
        assert client.get("/health").status_code == 503
        assert client.get("/metrics").status_code in (200, 503)
        engine.state = "ready"
        assert client.get("/v1/responses/resp_none").status_code == 404
        told = {"messages": [{"role": "user", "content": "secret"}], "max_tokens": 1, "n": 7}
        assert client.post("/v1/messages", json=told).status_code == 400
        wrong = client.post("/v1/completions", json={"prompt": 5.5})
        assert wrong.status_code == 400
        text = client.get("/metrics").text
    lines = [line for line in capsys.readouterr().err.splitlines() if " for " in line]
    assert lines.pop(0).startswith("ds_cp: 404 for GET /v1/responses/{response_id}: "), lines
    assert len(lines) == 2 and "secret" not in "".join(lines)
    assert lines[0].startswith("ds_cp: 400 for POST /v1/messages: invalid_value n; request "), lines
    assert lines[1].endswith(f"request {wrong.headers['x-request-id']}")
    counted = {
        tuple(sample.labels[name] for name in ("method", "handler", "status")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "ds_cp:http_requests_total"
    }
    assert not any(handler in ("/health", "/metrics") for _, handler, _ in counted)
    assert counted["POST", "/v1/messages", "400"] == counted["POST", "/v1/completions", "400"] == 1
