"""The engine requests of one HTTP request, run as one, and aborted when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from ds_cp.api.answers.budget import Held
from ds_cp.api.answers.mailbox import Mailbox
from ds_cp.api.metrics import ServerMetrics
from ds_cp.engine.interface import EngineInterface
from ds_cp.errors import EngineDeadError, RequestError
from ds_cp.outputs import Delta, PromptProgress
from ds_cp.sampling_params import RequestOptions, SamplingParams

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One prompt of an HTTP request: one request of the engine, with ``params.n`` answers."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    options: RequestOptions


@contextmanager
def in_client_names(names: Mapping[str, str]) -> Iterator[None]:
    """Let a ``RequestError`` of the engine name the field as the client does: ``names`` maps the
    engine's names to the client's where they differ."""
    try:
        yield
    except RequestError as err:
        if err.param is not None:
            err.param = names.get(err.param, err.param)
        raise


class Generation:
    """Runs the jobs of one HTTP request; ``close`` aborts those that have not finished."""

    def __init__(
        self,
        engine: EngineInterface,
        metrics: ServerMetrics,
        jobs: Sequence[Job],
        arrival: float,
        names: Mapping[str, str],
        held: Held,
    ) -> None:
        self._engine = engine
        self._jobs = tuple(jobs)
        self._names = names  # the client's name of a parameter, where it differs
        self._metrics = metrics
        self._arrival = arrival  # of the HTTP request, in seconds of time.monotonic()
        self._mailbox = Mailbox(held)  # what waits for a slow client is charged to ``held``
        self._unfinished = sum(job.params.n for job in jobs)  # answers
        self._waiting: asyncio.Task[tuple[int, Delta]] | None = None
        loop = asyncio.get_running_loop()
        self._answered: list[asyncio.Future[None]] = [loop.create_future() for _ in jobs]
        self._tasks = [
            asyncio.create_task(self._pump(index, job)) for index, job in enumerate(jobs)
        ]

    async def admitted(self, timeout_s: float) -> None:
        """Wait until every job has its first delta, at most ``timeout_s``. Raises the engine's
        refusal of a job.

        So a refusal becomes an HTTP status; in a stream that has begun it can only be an event.
        """
        done, _ = await asyncio.wait(
            self._answered, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        for future in done:
            future.result()

    async def next(self, timeout_s: float | None = None) -> tuple[int, Delta] | None:
        """The next delta and the index of its job; None after ``timeout_s`` seconds without one.

        Raises what the engine raised for any job.
        """
        if self._waiting is None:
            self._waiting = asyncio.create_task(self._mailbox.get())
        done, _ = await asyncio.wait({self._waiting}, timeout=timeout_s)
        if not done:
            return None
        waited, self._waiting = self._waiting, None
        index, item = waited.result()
        if item.finish_reason is not None:
            self._unfinished -= 1
        return index, item

    @property
    def reads_prompts(self) -> bool:
        """Whether a prompt waits for its first token."""
        return not all(future.done() for future in self._answered)

    def progress(self) -> tuple[int, PromptProgress] | None:
        """How far the first prompt that waits for its first token has come, and the index of its
        job; None where none is on its way."""
        for index, (future, job) in enumerate(zip(self._answered, self._jobs, strict=True)):
            if not future.done():
                known = self._engine.progress(job.request_id)
                return None if known is None else (index, known)
        return None

    def read_prompt(self, index: int, first: Delta) -> PromptProgress:
        """The progress of a prompt that has been read, as its ``first`` delta says. The time of one
        that no look at its progress found on its way has the queue in it."""
        total = len(self._jobs[index].prompt_token_ids)
        return PromptProgress(total, first.cached_tokens or 0, total, monotonic() - self._arrival)

    @property
    def finished(self) -> bool:
        """Whether the last delta of every answer of every job has been returned."""
        return self._unfinished == 0

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """All deltas of all jobs in the order of their arrival, each with the index of its job."""
        while not self.finished:
            item = await self.next()
            assert item is not None
            yield item

    async def close(self) -> None:
        """Abort the unfinished jobs and wait until the engine's iterators are closed. May be called
        twice."""
        tasks = [*self._tasks, *([self._waiting] if self._waiting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for future in self._answered:
            if not future.done():
                future.cancel()
            elif not future.cancelled():
                future.exception()  # read, so that asyncio does not report it as never retrieved

    async def _pump(self, index: int, job: Job) -> None:
        stream = self._engine.generate(
            job.request_id, job.prompt_token_ids, job.params, job.options
        )
        ended = False
        left = job.params.n  # answers without their last delta
        times = _Times(self._metrics, self._arrival)
        try:
            with in_client_names(self._names):
                async for delta in stream:
                    left -= delta.finish_reason is not None
                    ended = left == 0
                    times.observe(delta, ended)
                    if not self._answered[index].done():
                        self._answered[index].set_result(None)
                    self._mailbox.put(index, delta)
                    if ended:
                        return
            raise EngineDeadError(f"request {job.request_id} ended without a finish reason")
        except Exception as err:
            ended = True
            if not self._answered[index].done():
                self._answered[index].set_exception(err)
            self._mailbox.put(index, err)
        finally:
            if not ended:
                self._engine.abort(job.request_id)
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()


class _Times:
    """The latencies of one engine request: from its arrival to the first token of any answer,
    between the tokens of each answer, and from the arrival to the end of the last answer (not where
    an answer was aborted)."""

    def __init__(self, metrics: ServerMetrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: dict[int, float] = {}  # answer index -> time of its latest tokens
        self._whole = True  # no answer was aborted

    def observe(self, delta: Delta, ended: bool) -> None:
        """Record the latencies of one delta; ``ended``: it is the last one of the request."""
        now = monotonic()
        if delta.token_ids:
            if delta.index in self._last:
                self._metrics.next_token(now - self._last[delta.index])
            elif not self._last:
                self._metrics.first_token(now - self._arrival)
            self._last[delta.index] = now
        if delta.finish_reason is not None:
            self._whole = self._whole and delta.finish_reason in ("stop", "length")
        if ended and self._whole:
            self._metrics.finished(now - self._arrival)


async def unless_disconnected(
    receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Result]
) -> Result | None:
    """The result of ``work``, or None when the client left first (``work`` is cancelled then).

    ``receive`` is the ASGI server's own, after the whole body: its next message is
    ``http.disconnect``.
    """
    answer = asyncio.create_task(work)
    leaving = asyncio.create_task(until_disconnect(receive))
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        leaving.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


async def until_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
