"""What the scripts of the clients share. It runs in their environments: the standard library alone.

``python SCRIPT BASE_URL MODEL KEY PROXY_URL [NAME ...]`` prints one JSON object as its last line:
the versions of the packages, and for every check of ``NAMES``, or for those named, its result.
Results are

- ``ok``;
- ``none``: this client has nothing of the kind;
- ``failed``.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

NAMES = (
    "models listed",
    "plain chat",
    "system and several turns",
    "developer message",
    "name of a participant",
    "content in parts",
    "earlier answer without text",
    "stream",
    "usage in the stream",
    "max tokens",
    "stop",
    "temperature 0, top_p and seed repeat",
    "log-probabilities",
    "several answers",
    "text completion",
    "async chat",
    "async stream",
    "no such model",
    "context overflow",
    "wrong key",
    "value out of range",
    "retry after 429",
    "retry after 503",
    "error inside a stream",
    "leaving mid-stream",
    "embeddings (not served)",
    "tools",
    "tools in a stream",
    "agent loop",
    "JSON output",
    "JSON by a schema",
    "JSON by a schema in a stream",
    "structured answer by prompt",
    "response",
    "response in a stream",
    "response with tools",
    "response by a schema",
    "message",
    "tokens counted",
)
CHECK_S = 120  # seconds of one check, on a busy machine
LONG = "word " * 3000  # more tokens than the server's model length
STORY = "Count from one to twenty in words."
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city in the next days.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
ASK_WEATHER = "What is the weather in Oslo in the next 2 days?"
ASK_JSON = "Describe Ann, who is 30, in JSON with her name, age and mood."


class AbsentError(Exception):
    """The client has nothing of the kind; the message says why."""


class Checks:
    """Runs checks as they are declared and keeps their results."""

    def __init__(self, *packages: str) -> None:
        self.base, self.model, self.key, self.proxy = sys.argv[1:5]
        self.chosen = sys.argv[5:] or NAMES
        self.packages = packages
        self.declared: set[str] = set()
        self.results: dict[str, dict[str, str]] = {}

    @property
    def url(self) -> str:
        """Base URL of clients."""
        return self.base + "/v1"

    def through(self, label: str, fault: str = "none") -> str:
        """Base URL of clients by the recording proxy."""
        return f"{self.proxy}/t/{label}/{fault}/v1"

    def count(self, label: str) -> int:
        """How many requests the proxy has seen under a label."""
        with urllib.request.urlopen(f"{self.proxy}/t/{label}/count", timeout=10) as answer:
            return int(json.load(answer)["count"])

    def check(self, name: str, *given: str) -> Callable[[Callable[..., Any]], None]:
        """Run the decorated function with what is ``given``, now, if the check is chosen. It
        returns a remark or None."""
        self._declare(name)

        def run(body: Callable[..., Any]) -> None:
            if name not in self.chosen:
                return
            began = time.monotonic()
            signal.signal(signal.SIGALRM, _late)
            signal.alarm(CHECK_S)
            try:
                remark = body(*given)
                found = ("ok", str(remark or ""))
            except AbsentError as err:
                found = ("none", str(err))
            except BaseException as err:
                if isinstance(err, KeyboardInterrupt):
                    raise
                traceback.print_exc(file=sys.stderr)
                found = ("failed", text_of(err))
            finally:
                signal.alarm(0)
            seconds = round(time.monotonic() - began, 2)
            self.results[name] = {"result": found[0], "detail": found[1][:300]}
            print(f"{found[0]:8} {name} ({seconds} s) {found[1][:150]}", file=sys.stderr)

        return run

    def absent(self, *names: str, why: str) -> None:
        """Say that the client has nothing of these kinds."""
        for name in names:
            self._declare(name)
            self.results[name] = {"result": "none", "detail": why}

    def rest_absent(self, why: str) -> None:
        """Say of every check that was not declared that the client has nothing of its kind."""
        self.absent(*(name for name in NAMES if name not in self.declared), why=why)

    def finish(self) -> None:
        """Print the results. Every name must have been declared."""
        missing = [name for name in NAMES if name not in self.declared]
        assert not missing, missing
        rows = [{"check": name} | self.results[name] for name in NAMES if name in self.chosen]
        print(json.dumps({"versions": {p: _version(p) for p in self.packages}, "rows": rows}))

    def idle(self, within_s: float = 5.0) -> None:
        """Assert that the server runs no request within some seconds."""
        end = time.monotonic() + within_s
        while (running := self._running()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not running, f"{running} request(s) still run {within_s:g} s after the client left"

    def busy(self) -> None:
        """Assert that a request runs now."""
        assert self._running(), "no request runs"

    def _declare(self, name: str) -> None:
        assert name in NAMES and name not in self.declared, name
        self.declared.add(name)

    def _running(self) -> int:
        request = urllib.request.Request(
            self.base + "/metrics", headers={"Authorization": f"Bearer {self.key}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith("ds_cp:num_requests_running"):
                    return int(float(line.rsplit(" ", 1)[1]))
        raise AssertionError("no metric of running requests")


def weather(city: str, days: int) -> str:
    """What ``TOOL`` answers."""
    return f"Rain in {city} for {days} day(s)."


def is_call(name: str, arguments: str) -> None:
    """Assert that a call is one of ``TOOL``."""
    found = json.loads(arguments)
    assert name == TOOL["function"]["name"], name
    assert isinstance(found["city"], str) and len(found["city"]) <= 20, found
    assert isinstance(found["days"], int) and 1 <= found["days"] <= 9, found


def is_object(text: str, reason: str) -> None:
    """Assert that an answer is a JSON object, or begins one where ``reason`` says it was cut."""
    assert text.lstrip().startswith("{"), text
    assert reason == "length" or isinstance(json.loads(text), dict), text


def raises(kind: type[BaseException], body: Callable[[], Any], *words: str) -> str:
    """The type and message of the error, which must be of ``kind`` and have the words."""
    try:
        answer = body()
    except kind as err:
        text = text_of(err)
        missing = [word for word in words if word.lower() not in text.lower()]
        assert not missing, f"{type(err).__name__} without {missing}: {text}"
        return f"{type(err).__name__}: {text[:160]}"
    raise AssertionError(f"no {kind.__name__}; the answer was {str(answer)[:200]}")


def chain(err: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = err
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def text_of(err: BaseException) -> str:
    """One line."""
    return f"{type(err).__name__}: {err}".replace("\n", " ")[:600]


def _late(*_: object) -> None:
    raise TimeoutError(f"not within {CHECK_S} s")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
