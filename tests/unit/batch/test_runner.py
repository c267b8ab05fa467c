"""A batch over the application: refusals, a busy engine, a dead one, a run that is cut off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ds_cp.batch.format import BatchRequest
from ds_cp.batch.runner import BatchReport, run_batch
from ds_cp.errors import EngineDeadError, QueueFullError
from tests.helpers.batches import (
    CHAT,
    TEXT,
    Sink,
    line,
    opened,
    parsed,
    reply,
    requests_of,
    run,
    within,
)
from tests.helpers.fake_engine import FakeEngine, expected_ids


def test_answers_are_the_servers(engine: FakeEngine, tokenizer: Any) -> None:
    httpx = pytest.importorskip("httpx")
    chat = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 4, "logprobs": True}
    bodies = {"c": (CHAT, chat), "t": (TEXT, {"prompt": ["one", "two"], "max_tokens": 2})}
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})
        for name, (url, body) in bodies.items()
    ]
    sink = Sink()
    report = run(engine, requests_of(*lines), sink)

    async def over_httpx() -> dict[str, Any]:
        async with opened(engine) as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://[::1]") as client:
                return {
                    name: (await client.post(url, json=body)).json()
                    for name, (url, body) in bodies.items()
                }

    for name, expected in asyncio.run(over_httpx()).items():
        answer = sink.by_id[name]
        assert answer["error"] is None and answer["id"].startswith("batch_req_")
        assert answer["response"]["status_code"] == 200 and answer["response"]["request_id"]
        varying = {"id", "created"}
        got = answer["response"]["body"]
        assert {key: value for key, value in got.items() if key not in varying} == {
            key: value for key, value in expected.items() if key not in varying
        }
    assert (report.answered, report.completion_tokens, report.stopped) == (2, 4 + 2 * 2, None)


def test_refused_bodies_are_answers(engine: FakeEngine) -> None:
    sink = Sink()
    lines = [
        line("ok"),
        line("wrong", temperature=9),
        line("unknown", temprature=1),
        line("model", model="other"),
        line("long", max_tokens=10_000),
        line("surrogate", prompt="\ud800"),
        line("deep").replace('"a fox"', "[" * 400 + "]" * 400),
        line("huge", prompt="x" * 3000),
    ]
    report = run(engine, requests_of(*lines), sink, settings={"max_body_bytes": 2048})
    statuses = {name: got["response"]["status_code"] for name, got in sink.by_id.items()}
    assert statuses == dict.fromkeys(["wrong", "unknown", "long", "surrogate", "deep"], 400) | {
        "ok": 200,
        "model": 404,
        "huge": 413,
    }
    body = sink.by_id["unknown"]["response"]["body"]
    assert body["error"]["param"] == "temprature"
    assert (report.answered, report.refused, report.failed) == (1, 7, 0)
    assert len(report.first_refused) == 5
    named = {item.custom_id: item for item in report.first_refused}
    assert named["wrong"].line == 2 and "temperature" in named["wrong"].message


def test_order_is_that_of_completion(engine: FakeEngine, tokenizer: Any) -> None:
    engine.delay_s = 0.02
    lines = [line("slow", prompt=[9], max_tokens=50), *(line(f"q{i}", [i], max_tokens=1)
             for i in range(6))]  # fmt: skip
    sink = Sink()
    run(engine, requests_of(*lines), sink, concurrency=2)
    assert sink[-1]["custom_id"] == "slow" and len(sink) == 7
    for i in range(6):
        text = sink.by_id[f"q{i}"]["response"]["body"]["choices"][0]["text"]
        assert text == tokenizer.decode(expected_ids([i], 1, len(tokenizer)))


def test_api_key_goes_along(engine: FakeEngine) -> None:
    sink = Sink()
    settings = {"api_key": ("k",)}
    run(engine, requests_of(line("a")), sink, settings=settings)
    given = ((b"authorization", b"Bearer k"),)
    run(engine, requests_of(line("b")), sink, settings=settings, headers=given)
    assert [got["response"]["status_code"] for got in sink] == [401, 200]


def test_lines_done_before_are_left_out(engine: FakeEngine) -> None:
    sink = Sink()
    done = {"a": False, "b": True}
    report = run(engine, requests_of(line("a"), line("b"), line("c")), sink, done=done)
    assert list(sink.by_id) == ["c"] and len(engine.seen) == 1
    assert (report.answered, report.skipped, report.skipped_refused) == (1, 2, 1)


def test_broken_lines_are_handed_on(engine: FakeEngine) -> None:
    sink, broken = Sink(), []
    items = parsed("{", line("a"), *["?"] * 9)
    report = run(engine, items, sink, on_broken=broken.append)
    assert [problem.line for problem in broken] == [1, *range(3, 12)]
    assert (report.broken, report.answered, len(report.first_broken)) == (10, 1, 5)
    assert report.lines == 11


def test_reads_no_further_than_it_works(engine: FakeEngine) -> None:
    engine.delay_s = 0.002
    taken = 0
    ahead: list[int] = []

    def lines() -> Iterator[BatchRequest]:
        nonlocal taken
        for request in requests_of(*(line(f"r{i}", max_tokens=1) for i in range(60))):
            taken += 1
            ahead.append(taken - len(sink))
            yield request

    sink = Sink()
    run(engine, lines(), sink, concurrency=5)
    assert len(sink) == 60 and max(ahead) == 5


def test_at_most_so_many_at_once() -> None:
    busy, most = 0, 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.005)
        busy -= 1
        await reply(send, 200, {})

    requests = requests_of(*(line(f"{i}") for i in range(40)))
    report = within(90, run_batch(app, requests, Sink(), concurrency=7, on_broken=print))
    assert report.answered == 40 and most == 7


# --- a busy engine, a dead one


def test_a_full_queue_is_waited_for(engine: FakeEngine) -> None:
    engine.refuse = QueueFullError("the queue is full")

    async def main() -> BatchReport:
        asyncio.get_running_loop().call_later(0.3, lambda: setattr(engine, "refuse", None))
        async with opened(engine) as app:
            requests = requests_of(*(line(f"{i}") for i in range(8)))
            return await run_batch(app, requests, sink, concurrency=8, on_broken=print)

    sink = Sink()
    report = within(90, main())
    assert report.answered == 8 and report.refused == 0
    assert {got["response"]["status_code"] for got in sink} == {200}
    assert len(engine.seen) < 8 * 4  # one of them at a time asks again


def test_a_full_queue_behind_a_long_request_is_no_reason_to_give_up() -> None:
    """The only room is in use for longer than all pauses together."""
    room = 1

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal room
        if room == 0:
            await reply(send, 429, {"error": {"message": "full", "code": "queue_full"}})
            return
        room -= 1
        await asyncio.sleep(0.5 if b"long" in (await receive())["body"] else 0.0)
        room += 1
        await reply(send, 200, {})

    requests = requests_of(line("a", prompt="long"), *(line(f"{i}") for i in range(5)))
    work = run_batch(app, requests, Sink(), concurrency=6, on_broken=print, pauses_s=(0.01, 0.02))
    assert within(90, work).answered == 6


def test_a_request_too_large_for_the_queue_is_refused_in_the_end(engine: FakeEngine) -> None:
    engine.refuse = QueueFullError("the queue is full")
    sink = Sink()
    report = run(engine, requests_of(line("a")), sink, pauses_s=(0.01, 0.02, 0.03))
    assert len(engine.seen) == 4
    assert report.refused == 1 and "queue is full" in report.first_refused[0].message
    assert sink[0]["response"]["status_code"] == 429


def test_busy_with_a_time_to_come_back_is_asked_again() -> None:
    tries = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            await reply(send, 503, {}, (b"Retry-After", b"1"))
        else:
            await reply(send, 200, {})

    work = run_batch(app, requests_of(line("a")), Sink(), concurrency=1, on_broken=print,
                     pauses_s=(0.01,) * 3)  # fmt: skip
    assert within(90, work).answered == 1


def test_a_dead_engine_ends_the_run_unwritten(engine: FakeEngine) -> None:
    engine.break_after = (1, EngineDeadError("gone"))
    sink = Sink()
    report = run(engine, requests_of(*(line(f"{i}") for i in range(50))), sink, concurrency=2)
    assert report.stopped == "the engine has stopped" and not sink
    assert len(engine.seen) <= 4 and report.lines == 0


def test_one_failure_is_an_answer_of_its_own(engine: FakeEngine) -> None:
    engine.end = "error"
    sink = Sink()
    report = run(engine, requests_of(line("a"), line("b")), sink)
    assert report.failed == 2 and report.stopped is None
    assert sink[0]["response"]["body"]["error"]["code"] == "engine_error"


def test_an_application_that_breaks_off_is_an_error_of_the_request() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if b"raise" in (await receive())["body"]:
            raise RuntimeError("a\nb")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sink = Sink()
    requests = requests_of(line("a", prompt="raise"), line("b"))
    report = within(90, run_batch(app, requests, sink, concurrency=1, on_broken=print))
    assert report.failed == 2
    assert sink.by_id["a"]["response"] is None
    assert sink.by_id["a"]["error"] == {
        "code": "no_answer",
        "message": "no answer: RuntimeError: a b",
    }
    assert sink.by_id["b"]["error"]["code"] == "no_answer"


# --- cut off


def test_stop_writes_whole_lines_and_leaves_nothing_running(engine: FakeEngine) -> None:
    engine.delay_s = 0.02
    count = 0

    def write(data: bytes) -> None:
        nonlocal count
        sink(data)
        count += 1
        if count == 5:
            stop.set()

    sink, stop = Sink(), asyncio.Event()
    lines = [line(f"{i}", [i], max_tokens=1 + i % 7) for i in range(100)]
    report = run(engine, requests_of(*lines), write, stop=stop, concurrency=8)
    assert report.stopped == "interrupted" and 5 <= report.answered == len(sink) <= 12
    assert {got["response"]["status_code"] for got in sink} == {200}
    assert not engine.live


def test_cancelled_from_outside(engine: FakeEngine) -> None:
    engine.first_delay_s = 60.0

    async def main() -> None:
        async with opened(engine) as app:
            requests = requests_of(line("a"), line("b"))
            work = run_batch(app, requests, sink, concurrency=2, on_broken=print)
            task = asyncio.create_task(work)
            while len(engine.live) < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    sink = Sink()
    within(90, main())
    assert not sink and not engine.live


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_an_error_of_a_file_ends_the_rest(engine: FakeEngine, where: str) -> None:
    engine.delay_s = 0.01

    def lines() -> Iterator[BatchRequest]:
        yield from requests_of(*(line(f"{i}") for i in range(3)))
        if where == "reading":
            raise OSError("disk")
        yield from requests_of(*(line(f"z{i}") for i in range(30)))

    def write(data: bytes) -> None:
        if where == "writing":
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        run(engine, lines(), write)
    assert not engine.live and len(engine.seen) < 10
