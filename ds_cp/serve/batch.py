"""A file of requests through the HTTP application itself, without a socket: OpenAI's batch format.

Every body goes the server's own way, so what is valid, how a prompt is made of messages and what
an answer looks like cannot differ from it.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, BinaryIO

from ds_cp.config_text import parse_json, shorten, show
from ds_cp.serve.deadline import within

URLS = ("/v1/chat/completions", "/v1/completions")
KEYS = ("custom_id", "method", "url", "body")
MAX_ID_CHARS = 512
INTERRUPTED = "interrupted"  # how a report says that ``stop`` ended the run
SHOWN = 5  # problems of each kind that a report names
# Between the tries of a request that the server is too busy for, when nothing else of the batch is
# being answered; after the last one its refusal stands.
PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
LEAVE_S = 5.0  # for requests that were cut off to leave the engine

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class BatchRequest:
    """One good line. ``body`` is JSON, for the server to judge."""

    line: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True)
class Problem:
    """A line that is no request, or a request that was refused, and why."""

    line: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True)
class BatchReport:
    """What became of the lines so far: each is counted once.

    ``refused``: answered with 4xx; ``failed``: with 5xx; ``broken``: no request at all;
    ``skipped``: answered by an earlier run, ``skipped_refused`` of them with 4xx. Tokens are of
    this run's answers. ``stopped`` says why the rest was not done, or is None.
    """

    answered: int = 0
    refused: int = 0
    failed: int = 0
    broken: int = 0
    skipped: int = 0
    skipped_refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    first_refused: tuple[Problem, ...] = ()
    first_broken: tuple[Problem, ...] = ()

    @property
    def lines(self) -> int:
        """Lines that are done with."""
        return self.answered + self.refused + self.failed + self.broken + self.skipped


# --- reading


def read_requests(file: BinaryIO, max_line_bytes: int) -> Iterator[BatchRequest | Problem]:
    """The lines of a batch file as they are asked for; empty ones are left out.

    Of two requests with one ``custom_id`` the second is a ``Problem``. A line of more than
    ``max_line_bytes`` is never held whole.
    """
    lines_of: dict[str, int] = {}
    number = 0
    while raw := file.readline(max_line_bytes + 1):
        number += 1
        if len(raw) > max_line_bytes and not raw.endswith(b"\n"):
            size = len(raw) + _rest_of_line(file)
            message = f"the line has {size} bytes; at most {max_line_bytes} are read"
            yield Problem(number, None, "line_too_long", message)
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        raw = raw.strip()
        if not raw:
            continue
        item = parse_line(number, raw)
        if isinstance(item, BatchRequest):
            first = lines_of.setdefault(item.custom_id, number)
            if first != number:
                name = show(item.custom_id)
                item = Problem(
                    number,
                    item.custom_id,
                    "duplicate_custom_id",
                    f"custom_id {name} is that of line {first} already; give each line its own",
                )
        yield item


def parse_line(line: int, raw: bytes) -> BatchRequest | Problem:
    """One line, checked up to its body."""
    try:
        value = parse_json(raw.decode())
    except UnicodeDecodeError as error:
        return Problem(line, None, "invalid_json", f"not UTF-8 text: wrong byte at {error.start}")
    except ValueError as error:
        message = str(error).replace("at line 1, column", "at column")
        return Problem(line, None, "invalid_json", message)
    if not isinstance(value, dict):
        form = '{"custom_id", "method", "url", "body"}'
        return Problem(line, None, "not_an_object", f"not an object {form} but {show(value)}")
    name = value.get("custom_id")
    known = name if isinstance(name, str) and 1 <= len(name) <= MAX_ID_CHARS else None
    wrong = _envelope_problem(value, known)
    if wrong is not None:
        return Problem(line, known, *wrong)
    assert known is not None
    try:
        return BatchRequest(line, known, value["url"], _encode(value["body"]))
    except RecursionError:
        return Problem(line, known, "invalid_json", "not usable JSON: nested too deeply")


def _envelope_problem(value: dict[str, Any], custom_id: str | None) -> tuple[str, str] | None:
    """Code and message of what is wrong around a body, or with it having to be answered whole."""
    for key in value:
        if key not in KEYS:
            return "unknown_field", f"unknown field {show(key)}; a line has {', '.join(KEYS)}"
    for key in KEYS:
        if key not in value:
            return f"missing_{key}", f"{key} is missing; a line has {', '.join(KEYS)}"
    if custom_id is None:
        return "invalid_custom_id", (
            f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters, not "
            f"{show(value['custom_id'])}"
        )
    if value["method"] != "POST":
        return "invalid_method", f"method must be POST, not {show(value['method'])}"
    if value["url"] not in URLS:
        return "invalid_url", f"url must be {' or '.join(URLS)}, not {show(value['url'])}"
    body = value["body"]
    if not isinstance(body, dict):
        return "invalid_body", f"body must be an object with the request's fields, not {show(body)}"
    if body.get("stream") not in (None, False):
        return "stream_not_supported", "a batch answers whole: leave stream out of the body"
    return None


def _encode(body: dict[str, Any]) -> bytes:
    """A body as a client would send it, in UTF-8, which the server's bound on its size means."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which the server refuses in its own words
        return json.dumps(body, separators=(",", ":")).encode()


def _rest_of_line(file: BinaryIO) -> int:
    size = 0
    while part := file.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            return size - 1
    return size


# --- asking


@dataclass(frozen=True)
class Answer:
    """What the application said. ``busy``: it would rather be asked again later."""

    status: int
    request_id: str
    body: Any
    busy: bool


async def ask(app: App, url: str, body: bytes, headers: Headers = ()) -> Answer:
    """POST a JSON body to an ASGI application and take the whole answer.

    Raises what the application raises, and ``ValueError`` when its answer is not JSON.
    """
    exchange = _Exchange(body)
    scope: Message = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *headers,
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
    try:
        await app(scope, exchange.receive, exchange.send)
    finally:
        exchange.over.set()
    said = {name.lower(): value.decode("latin-1") for name, value in exchange.headers}
    busy = exchange.status == 429 or (exchange.status == 503 and b"retry-after" in said)
    whole = json.loads(b"".join(exchange.parts))
    return Answer(exchange.status, said.get(b"x-request-id", ""), whole, busy)


class _Exchange:
    """The server's side of one request: a client that stays until it has the answer."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.over = asyncio.Event()
        self.status = 500
        self.headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))


# --- running


async def run_batch(
    app: App,
    requests: Iterable[BatchRequest | Problem],
    write: Callable[[bytes], None],
    *,
    concurrency: int,
    on_broken: Callable[[Problem], None],
    done: Mapping[str, bool] | None = None,
    headers: Headers = (),
    stop: asyncio.Event | None = None,
    on_progress: Callable[[BatchReport], None] | None = None,
    pauses_s: tuple[float, ...] = PAUSES_S,
) -> BatchReport:
    """Ask for every request, at most ``concurrency`` at once, and write answers as they come.

    ``requests`` is read no further than it is worked on. ``write`` gets one whole line of JSON a
    call; ``on_broken`` gets every ``Problem`` among the requests. ``done``: ids to leave out, with
    whether they were refused. ``stop`` ends it early: what is in flight is cut off and not written.
    A request that the server is too busy for (429, or 503 with a time to come back) waits for
    others to finish; alone, it is tried again after each of ``pauses_s``. A server that has stopped
    (any other 503) ends the run, unwritten.

    Raises what ``requests`` and ``write`` raise, with the rest cut off.
    """
    run = _Run(app, iter(requests), write, on_broken, done or {}, headers, on_progress, pauses_s)
    stop = stop or asyncio.Event()
    working = asyncio.create_task(run.work(concurrency))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        whole = working.done()
        run.halted = True  # before anything is cancelled: the app answers a cancelled request
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
    stopped = None if whole else INTERRUPTED
    if not working.cancelled():
        try:
            working.result()
        except _StoppedError as error:
            stopped = str(error)
    return replace(run.report, stopped=stopped, seconds=monotonic() - run.began)


class _StoppedError(Exception):
    """The server behind the application has stopped."""


class _Run:
    def __init__(
        self,
        app: App,
        requests: Iterator[BatchRequest | Problem],
        write: Callable[[bytes], None],
        on_broken: Callable[[Problem], None],
        done: Mapping[str, bool],
        headers: Headers,
        on_progress: Callable[[BatchReport], None] | None,
        pauses_s: tuple[float, ...],
    ) -> None:
        self._app = app
        self._requests = requests
        self._write = write
        self._on_broken = on_broken
        self._done = done
        self._headers = headers
        self._on_progress = on_progress
        self._pauses_s = pauses_s
        self._in_app = 0
        self._freed = asyncio.Event()  # there may be room, or nobody left to wait for
        self._retrying = asyncio.Lock()  # one at a time, or a full queue would be stormed
        self.halted = False
        self.began = monotonic()
        self.report = BatchReport()

    async def work(self, concurrency: int) -> None:
        workers = [asyncio.create_task(self._worker()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            self.halted = True
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers, timeout=LEAVE_S)
            for worker in workers:
                if worker.done() and not worker.cancelled():
                    worker.exception()  # taken, so that asyncio does not report it as lost

    async def _worker(self) -> None:
        while (request := await self._next()) is not None:
            try:
                answer = await self._patient_ask(request)
            except Exception as error:
                self._take_none(request, error)
                continue
            if answer.status == 503 and not answer.busy:
                if not self.halted:
                    raise _StoppedError("the engine has stopped")
            elif not (self.halted and (answer.busy or answer.status >= 500)):
                self._take(request, answer)

    async def _next(self) -> BatchRequest | None:
        """The next request that has to be asked; what else is found on the way is noted."""
        while not self.halted:
            item = next(self._requests, None)
            if isinstance(item, Problem):
                self._on_broken(item)
                shown = (*self.report.first_broken, item)[:SHOWN]
                self._count(broken=1, first_broken=shown)
            elif item is not None and item.custom_id in self._done:
                self._count(skipped=1, skipped_refused=int(self._done[item.custom_id]))
            else:
                return item
            await asyncio.sleep(0)  # a million such lines in a row must not hold up the rest
        return None

    async def _patient_ask(self, request: BatchRequest) -> Answer:
        answer = await self._ask(request)
        if not answer.busy:
            return answer
        async with self._retrying:
            tries = 0
            while answer.busy and not self.halted and tries < len(self._pauses_s):
                alone = self._in_app == 0
                self._freed.clear()
                try:
                    await within(self._pauses_s[tries if alone else -1], self._freed.wait())
                except asyncio.TimeoutError:
                    tries += alone
                answer = await self._ask(request)
        return answer

    async def _ask(self, request: BatchRequest) -> Answer:
        self._in_app += 1
        try:
            answer = await ask(self._app, request.url, request.body, self._headers)
        finally:
            self._in_app -= 1
            if self._in_app == 0:  # whoever waits for others waits for nobody any more
                self._freed.set()
        if not answer.busy:
            self._freed.set()
        return answer

    def _take(self, request: BatchRequest, answer: Answer) -> None:
        response = {
            "status_code": answer.status,
            "request_id": answer.request_id,
            "body": answer.body,
        }
        self._put(request, response, None)
        if answer.status < 400:
            usage = answer.body.get("usage") or {}
            self._count(
                answered=1,
                prompt_tokens=usage.get("prompt_tokens", 0),
                completion_tokens=usage.get("completion_tokens", 0),
            )
        elif answer.status < 500:
            problem = Problem(request.line, request.custom_id, *_error_of(answer.body))
            shown = (*self.report.first_refused, problem)[:SHOWN]
            self._count(refused=1, first_refused=shown)
        else:
            self._count(failed=1)

    def _take_none(self, request: BatchRequest, error: Exception) -> None:
        """The application broke off: the request's error stands for its answer."""
        if not self.halted:
            message = shorten(f"no answer: {type(error).__name__}: {error}", 300)
            self._put(request, None, {"code": "no_answer", "message": message})
            self._count(failed=1)

    def _put(
        self, request: BatchRequest, response: dict[str, Any] | None, error: dict[str, str] | None
    ) -> None:
        line = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": request.custom_id,
            "response": response,
            "error": error,
        }
        self._write(json.dumps(line).encode() + b"\n")

    def _count(self, **more: Any) -> None:
        report = self.report
        changed: dict[str, Any] = {
            name: value if isinstance(value, tuple) else getattr(report, name) + value
            for name, value in more.items()
        }
        self.report = replace(report, **changed, seconds=monotonic() - self.began)
        if self._on_progress is not None:
            self._on_progress(self.report)


def _error_of(body: Any) -> tuple[str, str]:
    """Code and message of an answer in OpenAI's error shape."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return "unknown", shorten(f"no reason given: {show(body)}", 300)
    return str(error.get("code")), shorten(str(error.get("message")), 300)
