"""A real uvicorn on a free loopback port, in a thread, over the fake engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from ds_cp.api.app import create_app
from ds_cp.api.transport.listen import bind
from ds_cp.api.transport.server import serve_until
from ds_cp.config import Server
from tests.helpers.fake_engine import FakeEngine, expected_ids, make_tokenizer
from tests.helpers.spoken import SpokenEngine

PATIENCE_S = 60.0  # seconds to wait for what must come, on a busy machine


@dataclass
class Running:
    """A server under test."""

    engine: FakeEngine
    port: int
    stop: Callable[[], None]
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # No client reads the machine's certificates, which takes longer than most answers: it is HTTP.

    def client(self, api_key: str = "none") -> Any:  # not OpenAI: its unions need a check a line
        return openai.OpenAI(
            base_url=self.url + "/v1",
            api_key=api_key,
            max_retries=0,
            timeout=PATIENCE_S,
            http_client=openai.DefaultHttpxClient(verify=False),
        )

    def post(self, path: str, body: Any = None, **rest: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S, verify=False, **rest)

    def get(self, path: str, **rest: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S, verify=False, **rest)


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape, with one line as its message; on the paths of
    Anthropic's protocol in its shape, without ``param`` and ``code``."""
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    if reply.request.url.path.startswith("/v1/messages"):
        assert set(reply.json()) == {"type", "error", "request_id"}
        assert set(error) == {"message", "type"}
    else:
        assert set(reply.json()) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    assert reply.headers["x-request-id"]
    return error


def answer_text(engine: FakeEngine, prompt: list[int], count: int, index: int = 0) -> str:
    """The text of the fake engine's answer with this index."""
    ids = expected_ids(prompt, count, engine.info.vocab_size, index)
    return "".join(engine.tokenizer.decode([i]) for i in ids)


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
    """True as soon as the condition holds, False after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def stopped() -> Iterator[list[Running]]:
    """Servers that were told to stop with nothing in flight. They need a fifth of a second, in
    which the next test begins; that all of them stop is checked after a file's last test."""
    servers: list[Running] = []
    yield servers
    join(servers)


@pytest.fixture
def launch(tokenizer: Any, stopped: list[Running]) -> Iterator[Callable[..., Running]]:
    """``launch(engine=None, **settings)`` starts a server; all of them are stopped at the end."""
    with servers_of(tokenizer, stopped) as start:
        yield start


@pytest.fixture(scope="module")
def shared(tokenizer: Any, stopped: list[Running]) -> Iterator[Running]:
    """A server for all tests of a file, whose engine says what a test wants."""
    with servers_of(tokenizer, stopped) as start:
        yield start(SpokenEngine("x"))


@pytest.fixture
def spoken(launch: Callable[..., Running], shared: Running) -> Callable[..., Running]:
    """``spoken(*say, **settings)``: a server whose model says these texts in turn. Without settings
    it is ``shared``, and its engine as new."""

    def start(*say: str, **settings: Any) -> Running:
        if settings:
            return launch(SpokenEngine(*say), **settings)
        assert isinstance(shared.engine, SpokenEngine)
        shared.engine.renew(*say)
        return shared

    return start


@contextmanager
def servers_of(tokenizer: Any, stopped: list[Running]) -> Iterator[Callable[..., Running]]:
    """What starts servers, which are told to stop at the end. Those that have a request in flight
    are waited for, since its end may be seen; the others are added to ``stopped``."""
    servers: list[Running] = []

    def start(
        engine: FakeEngine | None = None,
        api_key: tuple[str, ...] | None = None,  # unchecked: also what a config may not hold
        **settings: Any,
    ) -> Running:
        engine = engine or FakeEngine(tokenizer)
        values: dict[str, Any] = {"port": 0, "drain_timeout_s": 1.0} | settings
        server = Server(**values).model_copy(update={"api_key": api_key})
        listeners = bind(server.host, server.port)
        port = listeners[0].getsockname()[1]
        loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

        async def main() -> None:
            stop = asyncio.Event()
            loops.append((asyncio.get_running_loop(), stop))
            await serve_until(create_app(engine, server), listeners, server, stop)

        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()

        def end() -> None:
            if thread.is_alive():
                loop, event = loops[0]
                loop.call_soon_threadsafe(event.set)

        running = Running(engine, port, end, thread)
        assert wait_for(lambda: _answers(running)), "the server did not start"
        servers.append(running)
        return running

    yield start
    for running in servers:
        running.stop()
    join([running for running in servers if vars(running.engine).get("live")])
    stopped += [running for running in servers if running.thread.is_alive()]


def join(servers: Sequence[Running]) -> None:
    """Wait for the end of servers that were told to stop."""
    for running in servers:
        running.thread.join(PATIENCE_S)
        assert not running.thread.is_alive(), "the server did not stop"


def _answers(running: Running) -> bool:
    try:
        return running.get("/health").status_code in (200, 503)
    except httpx.HTTPError:
        return False


@pytest.fixture
def served(launch: Callable[..., Running]) -> Running:
    """A server with the default settings."""
    return launch()
