"""The worst body of every schema costs its sender, not the others.

The bodies are made from the models, so that a field that is added is attacked too.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ds_cp.api.app import create_app
from ds_cp.api.errors import ApiError
from ds_cp.api.requests.bodies import SMALL_BYTES, _to_model
from ds_cp.api.requests.strict_model import Notes, StrictModel
from tests.helpers.front import front, honest_streams
from tests.helpers.places import INSIDE, ROUTES, places, valid

ATTACKERS = 4
LARGEST = 8 << 20  # bytes, the default of server.max_body_bytes
# Places that are attacked with whole bodies: the others cost no more, as the second test shows.
HEAVY = (
    "CompletionRequest.prompt:",
    "CompletionRequest:",
    "ChatCompletionRequest.messages:",
    "ChatMessage.content: 90,000",
    "TokenizeRequest.messages: 90,000",
    "DetokenizeRequest.tokens:",
    "MessagesRequest.messages:",
    "MessagesRequest.tools:",
    "ResponseRequest.input:",
    "ResponseRequest.tools:",
)


def _list(unit: str, most: int = LARGEST) -> Callable[[int], str]:
    """A list of ``unit`` over and over in so many bytes, with at most ``most`` of them."""
    return lambda room: "[" + unit * min(most, room // len(unit)) + "1]"


def _keys(room: int) -> str:
    return "{" + ",".join(f'"{i}":1' for i in range(min(90_000, room // 10))) + "}"


# What one place of a body is filled with: the bytes there are -> a text of JSON.
FILLINGS: dict[str, Callable[[int], str]] = {
    "wrong items": _list("{},"),
    "small integers": _list("1,"),
    "fractions": _list("1e9,"),
    "texts": _list('"",'),
    "long integers": _list("9" * 490 + ","),
    "nested": lambda room: '[{"a":' * (room // 6),
    "escaped": lambda room: '"' + "\\u0041" * (room // 6) + '"',
    "90,000 objects": _list("{},", 90_000),
    "900,000 integers": _list("12345,", 900_000),
    "90,000 keys": _keys,
}


def bodies(
    model: type[BaseModel], size: int, wanted: tuple[str, ...] = ("",)
) -> Iterator[tuple[str, str]]:
    """Bodies of at most ``size`` bytes, with their names: for every field one of each filling, then
    unknown names. Some are as heavy as a body that is read may be, so that they are validated.
    """
    for place, put in places(model):
        for what, fill in FILLINGS.items():
            if (name := f"{place}: {what}").startswith(wanted):
                yield name, put(fill(size - len(put("")) - 20))
    start = json.dumps(valid(model))[:-1]
    half = "k" * (size // 2 - 1000)
    for what, rest in (
        ("unknown names", (f'"field {i}": 1, ' for i in range(min(90_000, size // 30)))),
        ("a long name", (f'"{half}{half}": 1, ',)),
        ("a long name twice", (f'"{half}": 1, ', f'"{half}": 1, ')),
    ):
        if (name := f"{model.__name__}: {what}").startswith(wanted):
            yield name, f'{start}, {"".join(rest)}"x": 1' + "}"


def post(port: int, attack: tuple[str, str, str]) -> tuple[str, int, bytes]:
    path, name, body = attack
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return name, reply.status, reply.read()
    finally:
        connection.close()


def peak(process: int) -> int:
    """The most bytes that a process has had in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def test_every_route_with_a_model_is_attacked() -> None:
    from fastapi.routing import APIRoute

    from ds_cp.config import Server
    from tests.helpers.fake_engine import FakeEngine, make_tokenizer

    app = create_app(FakeEngine(make_tokenizer()), Server())
    routes = [route for route in _routes(app.router) if isinstance(route, APIRoute)]
    taken = {
        route.body_field.field_info.annotation: route.path
        for route in routes
        if route.body_field is not None
    }
    assert taken == ROUTES
    reached = {place.split(".")[0] for model in ROUTES for place, _ in places(model)}
    assert reached == {model.__name__ for model in _below(StrictModel) if model.model_fields} - {
        "CommonRequest",
        "ConstrainedRequest",
        "EngineFields",
        "SamplingRequest",
        "TemplateFields",
    }


def _routes(router: Any) -> Iterator[Any]:
    for route in router.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        yield from [route] if inner is None else _routes(inner)


def _below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for inner in model.__subclasses__():
        yield inner
        yield from _below(inner)


@pytest.mark.usefixtures("settled_heap")
@pytest.mark.parametrize("model", ROUTES, ids=lambda model: model.__name__)
def test_no_field_makes_a_body_costly(model: type[BaseModel]) -> None:
    """Seconds of processor time, not of the clock: other work on the machine does not count. On the
    old code a list of wrong items took 0.9 s."""
    size = 4 * SMALL_BYTES
    for name, text in bodies(model, size):
        assert len(text) <= size, name
        begun = time.thread_time()
        _to_model(text.encode(), model, Notes(), 4096)
        assert time.thread_time() - begun < 0.2, name


@pytest.mark.usefixtures("settled_heap")
@pytest.mark.parametrize("model", INSIDE, ids=lambda model: model.__name__)
def test_no_place_in_a_field_makes_a_body_costly(model: type[BaseModel]) -> None:
    size = 4 * SMALL_BYTES
    for place in INSIDE[model]:
        for what, fill in FILLINGS.items():
            text = '{"max_tokens": 5, ' + place.replace("@", fill(size - len(place) - 40)) + "}"
            assert len(text) <= size, place
            begun = time.thread_time()
            result = _to_model(text.encode(), model, Notes(), 4096)
            assert time.thread_time() - begun < 0.2, (place, what)
            assert isinstance(result, ApiError | model), (place, what)


@pytest.mark.quiet
def test_the_worst_bodies_hold_up_no_other_stream(tmp_path: Path) -> None:
    with front(tmp_path, engine={"delay_s": 0.01}) as attacked:
        worst = (
            (ROUTES[model], name, text)
            for model in ROUTES
            for name, text in bodies(model, LARGEST, HEAVY)
        )
        with honest_streams(attacked.url, 4) as met, ThreadPoolExecutor(ATTACKERS) as attackers:
            before = attacked.memory
            while batch := list(islice(worst, ATTACKERS)):
                for name, status, reply in attackers.map(partial(post, attacked.port), batch):
                    assert status in (200, 400), (name, status, reply[:200])
        after, most = attacked.memory, peak(attacked.process.pid)
        assert "Traceback" not in attacked.log.read_text()
    assert not met.lost, met.why
    # The aim is 0.1 s, which benchmarks/attacks.py measures on an idle machine. This one is not.
    assert met.gap_s <= met.bound_s, met
    assert most - before < 300 << 20 and after - before < 100 << 20
