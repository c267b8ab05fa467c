"""``ds-cp batch`` over the app: broken lines, refusals, resuming, a busy or dead engine, Ctrl-C."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import signal
import sys
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ds_cp.api.app import create_app
from ds_cp.batch.asgi_client import ask
from ds_cp.batch.files import AnswerFile, open_answers
from ds_cp.batch.format import BatchRequest, Problem, read_requests
from ds_cp.batch.runner import BatchReport, run_batch
from ds_cp.cli import main as cli
from ds_cp.config import Server
from ds_cp.errors import EngineDeadError, LaunchError, QueueFullError
from tests.helpers.fake_engine import FakeEngine, expected_ids, make_tokenizer

LIMIT = 4096
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id: Any, prompt: Any = "a fox", **body: Any) -> str:
    """A good line of /v1/completions."""
    body = {"prompt": prompt, "max_tokens": 3} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": TEXT, "body": body})


def parsed(*lines: str | bytes, limit: int = LIMIT) -> list[BatchRequest | Problem]:
    data = b"\n".join(text.encode() if isinstance(text, str) else text for text in lines)
    return list(read_requests(io.BytesIO(data), limit))


def requests_of(*lines: str) -> list[BatchRequest]:
    found = parsed(*lines)
    assert all(isinstance(item, BatchRequest) for item in found)
    return found  # type: ignore[return-value]


# --- reading


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        ("{", "invalid_json", "not valid JSON at column 2"),
        (b'{"custom_id": "\xff"}', "invalid_json", "not UTF-8 text: wrong byte at 15"),
        (b"\0\0", "invalid_json", "not valid JSON"),
        ('{"custom_id": "x", "body": {"temperature": NaN}}', "invalid_json", "NaN is not a JSON"),
        ('{"custom_id": "x", "custom_id": "y"}', "invalid_json", "given twice"),
        ("[" * 100_000, "line_too_long", f"100000 bytes; at most {LIMIT} are read"),
        ("[" * LIMIT, "invalid_json", "nested too deeply"),
        (
            '["a"]',
            "not_an_object",
            'not an object {"custom_id", "method", "url", "body"} but ["a"]',
        ),
        ("7", "not_an_object", "but 7"),
        (
            line("x").replace("method", "metod"),
            "unknown_field",
            '"metod"; a line has custom_id, me',
        ),
        ('{"method": "POST", "url": "u", "body": {}}', "missing_custom_id", "custom_id is missing"),
        ('{"custom_id": "x", "url": "u", "body": {}}', "missing_method", "method is missing"),
        ('{"custom_id": "x", "method": "POST", "body": {}}', "missing_url", "url is missing"),
        ('{"custom_id": "x", "method": "POST", "url": "u"}', "missing_body", "body is missing"),
        (line(7), "invalid_custom_id", "a string of 1 to 512 characters, not 7"),
        (line(""), "invalid_custom_id", 'not ""'),
        (line("x" * 513), "invalid_custom_id", "512"),
        (line("x").replace("POST", "GET"), "invalid_method", 'method must be POST, not "GET"'),
        (line("x").replace(TEXT, "/v1/embeddings"), "invalid_url", 'not "/v1/embeddings"'),
        (line("x").replace(f'"{TEXT}"', "[1]"), "invalid_url", "not [1]"),
        (
            json.dumps({"custom_id": "x", "method": "POST", "url": TEXT, "body": []}),
            "invalid_body",
            "must be an object",
        ),
        (line("x", stream=True), "stream_not_supported", "leave stream out"),
        (line("x", stream="yes"), "stream_not_supported", "leave stream out"),
        (line("first"), "duplicate_custom_id", 'custom_id "first" is that of line 1 already'),
    ],
)
def test_broken_line_is_told_and_the_rest_is_read(text: str | bytes, code: str, part: str) -> None:
    first, problem, last = parsed(line("first"), text, line("last", stream=False))
    assert isinstance(first, BatchRequest) and isinstance(last, BatchRequest)
    assert isinstance(problem, Problem)
    assert (problem.line, problem.code) == (2, code) and part in problem.message
    assert "\n" not in problem.message and len(problem.message) < 400
    assert (first.line, last.line, last.custom_id) == (1, 3, "last")


def test_a_problem_has_the_id_where_it_is_known() -> None:
    problems = parsed(line("x", stream=True), line(7), line("y"), line("y"), "{")
    ids = [item.custom_id for item in problems]
    assert ids == ["x", None, "y", "y", None]


def test_an_id_of_a_broken_line_is_free() -> None:
    broken, good = parsed(line("x", stream=True), line("x"))
    assert isinstance(broken, Problem) and isinstance(good, BatchRequest)


def test_line_ends_and_empty_lines() -> None:
    data = "\ufeff" + line("a") + "\r\n\n  \r\n" + line("b\u2028c")  # no line end at the end
    found = list(read_requests(io.BytesIO(data.encode()), LIMIT))
    assert [(item.line, item.custom_id) for item in found] == [(1, "a"), (4, "b\u2028c")]


def test_limit_is_of_the_line_without_its_end() -> None:
    text = line("a")
    assert isinstance(parsed(text, text, limit=len(text))[0], BatchRequest)
    problem, other = parsed(text, "{}", limit=len(text) - 1)
    assert isinstance(problem, Problem) and f"has {len(text)} bytes" in problem.message
    assert other.line == 2


def test_a_huge_line_is_never_held_whole() -> None:
    class Spy(io.BytesIO):
        largest = 0

        def readline(self, size: Any = -1) -> bytes:
            part = super().readline(size)
            self.largest = max(self.largest, len(part))
            return part

    file = Spy(b"x" * (8 << 20) + b"\n" + line("a").encode())
    problem, good = read_requests(file, LIMIT)
    assert isinstance(problem, Problem) and f"has {8 << 20} bytes" in problem.message
    assert good.custom_id == "a" and file.largest <= 1 << 20


def test_body_is_sent_in_utf8() -> None:
    (request,) = requests_of(line("a", prompt="日本" * 9))
    assert json.loads(request.body)["prompt"] == "日本" * 9
    assert len(request.body) < len(line("a", prompt="日本" * 9).encode()) / 2


# --- running, over the real application


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def engine(tokenizer: Any) -> FakeEngine:
    return FakeEngine(tokenizer)


@asynccontextmanager
async def opened(engine: Any, **settings: Any) -> AsyncIterator[Any]:
    app = create_app(engine, Server(**settings))
    async with app.router.lifespan_context(app):
        yield app


class Sink(list[Any]):
    """Takes answers, a whole line each."""

    def __call__(self, data: bytes) -> None:
        assert data.endswith(b"\n") and data.count(b"\n") == 1
        self.append(json.loads(data))

    @property
    def by_id(self) -> dict[str, Any]:
        assert len({answer["custom_id"] for answer in self}) == len(self)
        return {answer["custom_id"]: answer for answer in self}


def within(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, seconds))


def run(engine: Any, requests: Any, sink: Callable[[bytes], None], **options: Any) -> BatchReport:
    settings = options.pop("settings", {})
    given = {"concurrency": 4, "on_broken": lambda problem: None} | options

    async def main() -> BatchReport:
        async with opened(engine, **settings) as app:
            return await run_batch(app, requests, sink, **given)

    return within(30, main())


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
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
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
        line("unknown", frobnicate=1),
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
    assert body["error"]["param"] == "frobnicate"
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
    report = within(30, run_batch(app, requests, Sink(), concurrency=7, on_broken=print))
    assert report.answered == 40 and most == 7


async def reply(send: Any, status: int, body: Any, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    data = json.dumps(body).encode()
    await send({"type": "http.response.body", "body": data[:2], "more_body": True})
    await send({"type": "http.response.body", "body": data[2:]})


# --- a busy engine, a dead one


def test_a_full_queue_is_waited_for(engine: FakeEngine) -> None:
    engine.refuse = QueueFullError("the queue is full")

    async def main() -> BatchReport:
        asyncio.get_running_loop().call_later(0.3, lambda: setattr(engine, "refuse", None))
        async with opened(engine) as app:
            requests = requests_of(*(line(f"{i}") for i in range(8)))
            return await run_batch(app, requests, sink, concurrency=8, on_broken=print)

    sink = Sink()
    report = within(30, main())
    assert report.answered == 8 and report.refused == 0
    assert {got["response"]["status_code"] for got in sink} == {200}
    assert len(engine.seen) < 8 * 4  # one of them at a time asks again


def test_a_full_queue_behind_a_long_request_is_no_reason_to_give_up() -> None:
    """The room for one is taken for longer than all pauses together."""
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
    assert within(30, work).answered == 6


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
    assert within(30, work).answered == 1


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
    report = within(30, run_batch(app, requests, sink, concurrency=1, on_broken=print))
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
    within(10, main())
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


def test_receive_says_that_the_client_left_once_it_is_over() -> None:
    late: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive()) == {"type": "http.request", "body": b"{}", "more_body": False}
        late.append(asyncio.create_task(receive()))
        await reply(send, 200, {"a": 1}, (b"X-Request-Id", b"r"))

    async def main() -> None:
        answer = await ask(app, TEXT, b"{}")
        assert (answer.status, answer.request_id, answer.body) == (200, "r", {"a": 1})
        assert (await late[0])["type"] == "http.disconnect"

    within(5, main())


# --- the answer file


def answer_line(custom_id: str, status: int | None = 200, **body: Any) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": body} if status else None
    error = None if status else {"code": "no_answer", "message": "m"}
    whole = {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": response}
    return json.dumps(whole | {"error": error}).encode() + b"\n"


def reopened(path: Path, *more: bytes) -> AnswerFile:
    file = open_answers(str(path))
    for data in more:
        file.append(data)
    file.close()
    return file


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "out"
    before, last = answer_line("a") + answer_line("b", 400), answer_line("ü", text="x" * 50)
    for cut in range(len(last)):
        path.write_bytes(before + last[:cut])
        file = reopened(path, answer_line("c"))
        if cut < len(last) - 1:
            assert path.read_bytes() == before + answer_line("c")
            assert file.done == {"a": False, "b": True}
        else:  # only the line end is missing: it is an answer
            assert path.read_bytes() == before + last + answer_line("c")
            assert file.done == {"a": False, "b": True, "ü": False}


def test_answers_that_say_nothing_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "out"
    keep = [answer_line("a"), answer_line("d", 404), answer_line("f")]
    again = [answer_line("b", 500), answer_line("c", 429), answer_line("e", None)]
    torn = answer_line("g")[:-9]
    path.write_bytes(
        keep[0] + again[0] + again[1] + keep[1] + again[2] + keep[2] + answer_line("h", 503) + torn
    )
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    file = reopened(tmp_path / "link", answer_line("b"))
    assert path.read_bytes() == b"".join(keep) + answer_line("b")
    assert (file.done, file.again) == ({"a": False, "d": True, "f": False}, 4)
    assert path.stat().st_mode & 0o777 == 0o640 and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


@pytest.mark.parametrize(
    "data",
    [
        b"my notes",
        b"my notes\n",
        b'{"custom_id": "a"}\n',
        b'{"custom_id": "a", "response": {}}\n',
        b"[1]\n",
        b"\x7fELF",
        b"{",
        b'{"id": "batch_req_1", "custom_id": "a", "resp\n',  # a line end within: not torn by us
    ],
)
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, data: bytes) -> None:
    if data == b"{":  # the first byte of a torn answer
        assert reopened_bytes(tmp_path, answer_line("a") + data) == answer_line("a")
        return
    path = tmp_path / "out"
    for before in (b"", answer_line("a") + answer_line("b", 500)):
        path.write_bytes(before + data)
        with pytest.raises(LaunchError, match="is not an answer of a batch"):
            open_answers(str(path))
        assert path.read_bytes() == before + data


def reopened_bytes(tmp_path: Path, data: bytes) -> bytes:
    path = tmp_path / "out"
    path.write_bytes(data)
    reopened(path)
    return path.read_bytes()


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(answer_line("a", 500))  # so that the file is replaced
    file = open_answers(str(path))
    with pytest.raises(LaunchError, match="being written by another"):
        open_answers(str(path))
    file.close()
    open_answers(str(path)).close()


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "out"
    file = open_answers(str(path))
    file.append(answer_line("a"))
    real = os.write
    calls = 0

    def half(fd: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return real(fd, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(LaunchError, match="No space left on device; .* run the same command again"):
        file.append(answer_line("b"))
    monkeypatch.undo()
    assert path.read_bytes() == answer_line("a")
    file.append(answer_line("c"))
    file.close()
    assert path.read_bytes() == answer_line("a") + answer_line("c")


# --- the command


LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_CP_LAUNCHER", "OMPI_COMM_WORLD_RANK")


class Bench:
    """A folder with a config and an input; the command over a fake engine."""

    def __init__(self, folder: Path, engine: FakeEngine, capfd: Any) -> None:
        self.folder = folder
        self.engine = engine
        self.capfd = capfd
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.errors = folder / "out.jsonl.errors.jsonl"
        self.config = folder / "config.json"
        self.opened: list[Any] = []

    def run(self, *argv: str, output: str | None = None) -> int:
        target = output or str(self.output)
        return cli.main(["batch", str(self.input), target, "--config", str(self.config), *argv])

    @property
    def answers(self) -> dict[str, int]:
        """Ids and statuses; an id stands once."""
        lines = [json.loads(text) for text in self.output.read_bytes().splitlines()]
        found = {got["custom_id"]: (got["response"] or {}).get("status_code") for got in lines}
        assert len(found) == len(lines)
        return found


@pytest.fixture
def bench(tmp_path: Path, engine: FakeEngine, monkeypatch: Any, capfd: Any) -> Bench:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    raw = {"model": str(tmp_path / "model"), "server": {"api_key": "secret"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    bench = Bench(tmp_path, engine, capfd)

    @asynccontextmanager
    async def open_app(config: Any, job: Any) -> AsyncIterator[Any]:
        print("noise of a library")
        bench.opened.append((config, job))
        async with opened(bench.engine, api_key=config.server.api_key) as app:
            yield app

    module = types.ModuleType("ds_cp.serve.in_process")
    module.open_app = open_app  # type: ignore[attr-defined]
    module.follow = lambda config, job: 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ds_cp.serve.in_process", module)
    return bench


def test_command_answers_all(bench: Bench) -> None:
    bench.input.write_text("\n".join(line(f"{i}", [i]) for i in range(20)))
    assert bench.run("--concurrency", "3") == 0
    assert bench.answers == {f"{i}": 200 for i in range(20)}
    out, err = bench.capfd.readouterr()
    assert out == "" and "noise" in err
    assert "batch: 20 answered, 0 refused, 0 broken, in " in err and "60 tokens" in err
    assert not bench.errors.exists() and "\r" not in err  # no progress: not a terminal
    (_, job), *_ = bench.opened
    assert (job.rank, job.world_size) == (0, 1)


def test_command_again_does_what_is_left(bench: Bench) -> None:
    bench.input.write_text("\n".join(line(f"{i}", [i]) for i in range(9)))
    assert bench.run() == 0
    whole = bench.output.read_bytes().splitlines(keepends=True)
    failed = answer_line(json.loads(whole[0])["custom_id"], 500)
    bench.output.write_bytes(failed + b"".join(whole[1:4]) + whole[4][:30])
    bench.engine.seen.clear()
    bench.capfd.readouterr()
    assert bench.run() == 0
    assert bench.answers == {f"{i}": 200 for i in range(9)} and len(bench.engine.seen) == 6
    err = bench.capfd.readouterr().err
    assert "6 answered, 0 refused, 0 broken, 3 skipped as done" in err
    assert "failed answers of an earlier run, now redone: 1" in err
    assert bench.output.read_bytes().splitlines(keepends=True)[:3] == whole[1:4]
    assert bench.run() == 0 and len(bench.engine.seen) == 6


def test_broken_and_refused_are_code_2_each_time(bench: Bench) -> None:
    lines = [line("a"), "{", line("b", temperature=7), line("a"), "", line("c")]
    bench.input.write_text("\n".join(lines))
    for skipped in (0, 3):
        assert bench.run("--json") == 2
        assert bench.answers == {"a": 200, "b": 400, "c": 200}
        out, err = bench.capfd.readouterr()
        got = json.loads(out)
        assert (got["broken"], got["skipped"], got["skipped_refused"]) == (
            2,
            skipped,
            skipped // 3,
        )
        assert (got["answered"], got["refused"]) == ((2, 1) if skipped == 0 else (0, 0))
        assert [item["line"] for item in got["first_broken"]] == [2, 4]
        assert got["errors"] == str(bench.errors) and got["stopped"] is None
        assert f"{bench.input} line 2 broken: not valid JSON at column 2" in err
        errors = [json.loads(text) for text in bench.errors.read_text().splitlines()]
        assert [(item["line"], item["custom_id"]) for item in errors] == [(2, None), (4, "a")]
        assert errors[1]["error"]["code"] == "duplicate_custom_id"
    bench.input.write_text(line("a"))  # corrected
    assert bench.run() == 0 and not bench.errors.exists()


def test_ctrl_c_leaves_whole_lines(bench: Bench) -> None:
    bench.input.write_text("\n".join(line(f"{i}", [i], max_tokens=1 + i % 5) for i in range(300)))
    bench.engine.delay_s = 0.01
    before = signal.getsignal(signal.SIGINT)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        start = len(bench.answers) if bench.output.exists() else 0
        interrupt_when(lambda n: n >= 12, bench, number)
        assert bench.run("--concurrency", "4") == code
        assert start + 3 <= len(bench.answers) < 300 and set(bench.answers.values()) == {200}
        assert not bench.engine.live
        err = bench.capfd.readouterr().err
        assert "batch: interrupted; run the same command again to do what is left" in err
    assert signal.getsignal(signal.SIGINT) is before
    bench.engine.delay_s = 0.0
    bench.engine.seen.clear()
    left = 300 - len(bench.answers)
    assert bench.run() == 0
    assert bench.answers == {f"{i}": 200 for i in range(300)} and len(bench.engine.seen) == left


def interrupt_when(reached: Callable[[int], bool], bench: Bench, number: int) -> None:
    """Send the signal once so many requests have come to the engine."""
    generate, count = FakeEngine.generate, 0

    def counting(*args: Any, **rest: Any) -> Any:
        nonlocal count
        count += 1
        if reached(count):
            bench.engine.__dict__.pop("generate", None)
            os.kill(os.getpid(), number)
        return generate(bench.engine, *args, **rest)

    bench.engine.generate = counting  # type: ignore[method-assign]


def test_ctrl_c_while_the_engine_starts(bench: Bench, monkeypatch: Any) -> None:
    left = []

    @asynccontextmanager
    async def open_app(config: Any, job: Any) -> AsyncIterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
            yield None
        finally:
            left.append(True)

    monkeypatch.setattr(sys.modules["ds_cp.serve.in_process"], "open_app", open_app)
    bench.input.write_text(line("a"))
    assert bench.run() == 130 and left == [True]
    assert "run the same command again" in bench.capfd.readouterr().err


def test_dead_engine_is_code_1(bench: Bench) -> None:
    bench.input.write_text(line("a"))
    bench.engine.break_after = (1, EngineDeadError("gone"))
    assert bench.run("--json") == 1
    out, err = bench.capfd.readouterr()
    assert err.splitlines()[-1] == (
        "ds_cp: error: the engine has stopped; run the same command again to do the rest"
    )
    assert json.loads(out)["stopped"] == "the engine has stopped"
    assert bench.output.read_bytes() == b""


def test_failures_are_code_1_and_redone(bench: Bench) -> None:
    bench.input.write_text(line("a") + "\n" + line("b", temperature=7))
    bench.engine.end = "error"
    assert bench.run() == 1
    assert bench.answers == {"a": 500, "b": 400}
    assert "batch: 1 failed; run the same command again" in bench.capfd.readouterr().err
    bench.engine.end = None
    assert bench.run() == 2 and bench.answers == {"a": 200, "b": 400}


def test_cause_of_the_engine_comes_after_the_summary(bench: Bench, monkeypatch: Any) -> None:
    @asynccontextmanager
    async def open_app(config: Any, job: Any) -> AsyncIterator[Any]:
        async with opened(bench.engine, api_key=config.server.api_key) as app:
            yield app
        raise EngineDeadError("the worker of rank 1 was ended by SIGKILL")

    monkeypatch.setattr(sys.modules["ds_cp.serve.in_process"], "open_app", open_app)
    bench.input.write_text(line("a"))
    assert bench.run() == 1
    *_, summary, last = bench.capfd.readouterr().err.splitlines()
    assert "1 answered" in summary and last.endswith("rank 1 was ended by SIGKILL")


def test_answers_on_stdout(bench: Bench) -> None:
    bench.input.write_text("\n".join([line("a"), "{", line("b")]))
    assert bench.run(output="-") == 2
    out, err = bench.capfd.readouterr()
    assert sorted(json.loads(text)["custom_id"] for text in out.splitlines()) == ["a", "b"]
    assert f"{bench.input} line 2: not valid JSON" in err
    assert sorted(os.listdir(bench.folder)) == ["config.json", "in.jsonl", "model"]


def test_other_ranks_follow_without_the_files(bench: Bench, monkeypatch: Any) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert bench.run() == 5
    assert not bench.output.exists() and bench.opened == []


def test_what_cannot_be_worked_with_is_told_at_once(bench: Bench) -> None:
    def refused(source: Path | str, target: Path | str, *argv: str) -> str:
        argv = ("batch", str(source), str(target), "--config", str(bench.config), *argv)
        assert cli.main(argv) == 2
        out, err = bench.capfd.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    folder, good = bench.folder, bench.input
    assert "cannot read" in refused(folder / "none", "-")
    good.write_text("")
    assert "is empty" in refused(good, "-")
    good.write_text(line("a"))
    os.mkfifo(folder / "fifo")
    assert "not a regular file" in refused(folder / "fifo", "-")
    assert "not a regular file" in refused(folder, "-")
    assert "IN must be a file" in refused("-", bench.output)
    assert "not a regular file" in refused(good, folder)
    assert "is IN itself" in refused(good, good)
    assert "there is no folder" in refused(good, folder / "none" / "out")
    assert "name a file" in refused(good, "-", "--json")
    for wrong in ("0", "4097", "-1", "x", "9" * 5000, "²"):
        assert "--concurrency is" in refused(good, "-", f"--concurrency={wrong}")
    bench.output.write_text("my notes\n")
    assert "line 1 is not an answer of a batch" in refused(good, bench.output)
    bench.output.unlink()
    with open(bench.output, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "being written by another" in refused(good, bench.output)
    assert good.read_text() == line("a") and bench.opened == []


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [({"max_num_seqs": 3}, 6), ({"max_num_seqs": 3, "max_queue": 4}, 4)],
)
def test_auto_concurrency(
    bench: Bench, monkeypatch: Any, scheduler: dict[str, int], expected: int
) -> None:
    raw = json.loads(bench.config.read_text()) | {"scheduler": scheduler}
    bench.config.write_text(json.dumps(raw))
    bench.input.write_text("\n".join(line(f"{i}") for i in range(30)))
    now = most = 0
    generate = bench.engine.generate

    async def watching(*args: Any, **rest: Any) -> AsyncIterator[Any]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            async for delta in generate(*args, **rest):
                yield delta
        finally:
            now -= 1

    monkeypatch.setattr(bench.engine, "generate", watching)
    bench.engine.delay_s = 0.005
    assert bench.run() == 0 and most == expected


def test_progress_on_a_terminal(bench: Bench, monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    bench.input.write_text("\n".join(line(f"{i}") for i in range(12)))
    monkeypatch.setattr(sys, "stderr", terminal)
    assert bench.run() == 0
    shown = terminal.getvalue().split("\r")
    assert any("/12 done, " in text and "tokens/s" in text for text in shown)
    assert shown[-1].startswith("batch: 12 answered")
