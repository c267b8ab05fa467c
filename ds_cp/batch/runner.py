"""Runs a batch: sends its requests to the HTTP application itself, without a socket.

So a batch accepts the same bodies, builds the same prompts and writes the same answers as the
server.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from ds_cp.api.transport.deadline import within
from ds_cp.batch.asgi_client import Answer, App, Headers, ask
from ds_cp.batch.format import BatchRequest, Problem
from ds_cp.batch.resumable import ResumableLines
from ds_cp.text import shorten, show

INTERRUPTED = "interrupted"  # ``BatchReport.stopped`` of a run that ``stop`` ended
SHOWN = 5  # problems of each kind that a report names
# Seconds between the tries of a request that the server is too busy for, while it answers nothing
# else of the batch; after the last one the refusal is final.
PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
MAX_REASON_CHARS = 300  # characters of a refusal in a report
LEAVE_S = 5.0  # seconds for cancelled requests to leave the engine


@dataclass(frozen=True)
class BatchReport:
    """Counts of the lines so far; each line is counted once.

    ``refused``: answered with 4xx. ``failed``: answered with 5xx, or not at all; ``faults`` of them
    with 500 or not at all, which would happen again. ``broken``: not a request.
    ``skipped``: answered by an earlier run; ``skipped_refused`` of them with 4xx. Tokens are those
    of this run's answers. ``stopped``: the reason why lines are left, or None.
    """

    answered: int = 0
    refused: int = 0
    failed: int = 0
    faults: int = 0
    broken: int = 0
    skipped: int = 0
    skipped_refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    first_refused: tuple[Problem, ...] = ()
    first_broken: tuple[Problem, ...] = ()
    first_failed: tuple[Problem, ...] = ()

    @property
    def lines(self) -> int:
        """All lines counted so far."""
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
    resumable: ResumableLines | None = None,
) -> BatchReport:
    """Send every request, at most ``concurrency`` at once, and write the answers as they come.

    ``requests`` is read only as workers become free. ``write`` gets one whole line of JSON a call;
    ``on_broken`` gets every ``Problem`` among the requests. ``done``: ids to leave out, and whether
    they were refused. ``stop`` ends the run early: requests in flight are cancelled and not
    written. A request that the server is too busy for (429, or 503 with a time to retry) waits for
    others to finish; alone, it is sent again after each of ``pauses_s`` (seconds). A server that
    has stopped (any other 503) ends the run, and that answer is not written. ``resumable``: keeps
    lines that are in the middle for a later run.

    Raises what ``requests`` and ``write`` raise, with the requests in flight cancelled.
    """
    run = _Run(
        app, iter(requests), write, on_broken, done or {}, headers, on_progress, pauses_s, resumable
    )
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
        except _StoppedError as err:
            stopped = str(err)
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
        resumable: ResumableLines | None,
    ) -> None:
        self._app = app
        self._requests = requests
        self._write = write
        self._on_broken = on_broken
        self._done = done
        self._headers = headers
        self._on_progress = on_progress
        self._pauses_s = pauses_s
        self._resumable = resumable
        self._in_app = 0
        self._freed = asyncio.Event()  # the server has room again, or nothing is in flight
        self._retrying = asyncio.Lock()  # one retry at a time, or all would refill the queue
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
                    worker.exception()  # read, or asyncio reports it as never retrieved

    async def _worker(self) -> None:
        while (request := await self._next()) is not None:
            try:
                answer = await self._patient_ask(request)
            except Exception as err:
                self._write_failure(request, err)
                continue
            if answer.status == 503 and not answer.busy:
                if not self.halted:
                    raise _StoppedError("the engine has stopped")
            elif not (self.halted and (answer.busy or answer.status >= 500)):
                self._write_answer(request, answer)

    async def _next(self) -> BatchRequest | None:
        """The next request to send, or None at the end. Broken and skipped lines before it are
        counted."""
        while not self.halted:
            item = next(self._requests, None)
            if isinstance(item, Problem):
                self._on_broken(item)
                shown = (*self.report.first_broken, item)[:SHOWN]
                self._count(broken=1, first_broken=shown)
            elif item is not None and item.custom_id in self._done:
                self._count(skipped=1, skipped_refused=int(self._done[item.custom_id]))
                self._forget(item)
            else:
                return item
            await asyncio.sleep(0)  # a million such lines in a row must not hold up the answers
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
            name = self._resumable.name(request) if self._resumable is not None else ""
            answer = await ask(self._app, request.url, request.body, self._headers, name)
        finally:
            self._in_app -= 1
            if self._in_app == 0:  # a request that waits for others must try by itself
                self._freed.set()
        if not answer.busy:
            self._freed.set()
        return answer

    def _write_answer(self, request: BatchRequest, answer: Answer) -> None:
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
            problem = Problem(request.line, request.custom_id, *_error_of(answer.body))
            self._count_failure(problem, fault=answer.status == 500)

    def _write_failure(self, request: BatchRequest, err: Exception) -> None:
        """Write that the application raised instead of answering."""
        if not self.halted:
            message = shorten(f"no answer: {type(err).__name__}: {err}", MAX_REASON_CHARS)
            self._put(request, None, {"code": "no_answer", "message": message})
            problem = Problem(request.line, request.custom_id, "no_answer", message)
            self._count_failure(problem, fault=True)

    def _count_failure(self, problem: Problem, fault: bool) -> None:
        shown = (*self.report.first_failed, problem)[:SHOWN]
        self._count(failed=1, faults=int(fault), first_failed=shown)

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
        self._forget(request)

    def _forget(self, request: BatchRequest) -> None:
        if self._resumable is not None:
            self._resumable.done(request)

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
        return "unknown", shorten(f"no reason given: {show(body)}", MAX_REASON_CHARS)
    return str(error.get("code")), shorten(str(error.get("message")), MAX_REASON_CHARS)
