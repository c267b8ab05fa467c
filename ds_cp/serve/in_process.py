"""The HTTP application over an engine in this process, without a socket, for ``ds-cp batch``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from ds_cp.api.app import create_app
from ds_cp.config import Config
from ds_cp.errors import DsCpError
from ds_cp.journal.journal import open_journal
from ds_cp.log_stream import say
from ds_cp.model.loading import load_tokenizer
from ds_cp.model.source import find_model
from ds_cp.serve.channel import Ready
from ds_cp.serve.journaled_engine import JournaledEngine
from ds_cp.serve.worker_link import Lead, LocalLink, ReadSent, Sent
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import join_job
from ds_cp.startup.report import summary
from ds_cp.topology.job import Job

LEAVE_S = 60.0  # seconds for the current step, at the end


@asynccontextmanager
async def open_app(config: Config, job: Job) -> AsyncIterator[Any]:
    """Rank 0: join the job, load the model, and yield the ASGI application over a ready engine.

    The other ranks call ``follow`` meanwhile. Raises the typed error of a start that fails.
    """
    source = find_model(config.model)
    journal = open_journal(config)
    on_exit: list[Callable[[], None]] = []
    deaths: list[DsCpError] = []

    def build() -> tuple[Lead, ReadSent, Ready]:
        world, threads = join_job(job, config)
        on_exit.append(world.leave)
        worker, facts = build_worker(world, config, source, threads)
        on_exit[:] = [worker.leave]

        def read_sent() -> Sent:
            return {k: (e.bytes, e.exchanges) for k, e in world.ledger.schemes().items()}

        return worker.lead, read_sent, Ready(facts, tuple(summary(config, facts)))

    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_ready(_: Ready) -> None:
        def done() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.call_soon_threadsafe(done)

    def on_death(err: DsCpError, _: int) -> None:
        def fail() -> None:
            if ready.done():
                deaths.append(err)
                print(f"ds_cp: error: {err}", file=sys.stderr, flush=True)
            else:
                ready.set_exception(err)

        loop.call_soon_threadsafe(fail)

    engine = JournaledEngine(
        journal, config, source.name, LocalLink(build), loop,
        lambda: load_tokenizer(source), on_ready, on_death, paced=False,
    )  # fmt: skip
    engine.start()
    try:
        await ready
        for line in engine.journal_lines:
            say(line)
        app = create_app(engine, config.server)
        app.state.journal = journal  # what a batch keeps of its lines
        app.state.deaths = deaths  # what has ended the engine, if anything has
        async with app.router.lifespan_context(app):
            yield app
    finally:
        await engine.stop(LEAVE_S)
        for leave in on_exit:
            leave()


def follow(config: Config, job: Job) -> int:
    """A rank other than 0: run the plans of rank 0 up to the stop plan. Returns the exit code."""
    world, threads = join_job(job, config)
    worker, _ = build_worker(world, config, None, threads)
    worker.follow()
    worker.leave()
    return 0
