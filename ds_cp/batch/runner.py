"""A file of requests through the HTTP application itself, without a socket: OpenAI's batch format.

Every body goes the server's own way, so what is valid, how a prompt is made of messages and what
an answer looks like cannot differ from it.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from ds_cp.api.deadline import within
from ds_cp.batch.asgi_client import Answer, App, Headers, ask
from ds_cp.batch.format import BatchRequest, Problem
from ds_cp.text import shorten, show

INTERRUPTED = "interrupted"  # how a report says that ``stop`` ended the run
SHOWN = 5  # problems of each kind that a report names
# Between the tries of a request that the server is too busy for, when nothing else of the batch is
# being answered; after the last one its refusal stands.
PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
LEAVE_S = 5.0  # for requests that were cut off to leave the engine


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
