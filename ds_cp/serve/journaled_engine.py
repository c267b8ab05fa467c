"""Rank 0's engine with a journal: requests that are resumable are recorded as they go, and one that
was recorded before a restart goes on from its last token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from ds_cp.config import Config
from ds_cp.engine.interface import EngineStats
from ds_cp.errors import DsCpError
from ds_cp.journal.journal import Journal
from ds_cp.outputs import Delta
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.serve.async_engine import AsyncEngine
from ds_cp.serve.channel import Ready
from ds_cp.serve.worker_link import WorkerLink

FLUSH_S = 0.04  # seconds for which tokens are gathered before they go to the journal's thread


class JournaledEngine(AsyncEngine):
    """An ``AsyncEngine``; without a ``journal`` just that. The journal is checked against the model
    before the engine is said to be ready, and closed after ``stop``."""

    def __init__(
        self,
        journal: Journal | None,
        config: Config,
        model_name: str,
        link: WorkerLink,
        loop: asyncio.AbstractEventLoop,
        load_tokenizer: Callable[[], Any],
        on_ready: Callable[[Ready], None],
        on_death: Callable[[DsCpError, int], None],
        paced: bool = True,
        is_mending: Callable[[], bool] = lambda: False,
    ) -> None:
        self.journal = journal
        self.journal_lines: list[str] = []  # of its start, for the operator
        self._loop = loop
        self._flush_at: asyncio.TimerHandle | None = None

        def ready(found: Ready) -> None:
            if journal is not None:
                self.journal_lines = journal.start(found.facts.fingerprint)
            on_ready(Ready(found.facts, (*found.summary, *self.journal_lines)))

        super().__init__(
            config, model_name, link, loop, load_tokenizer, ready, on_death, paced, is_mending
        )

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions | None = None,
    ) -> AsyncIterator[Delta]:
        """As ``AsyncEngine`` does. A request that goes on gives what it had as its first deltas."""
        if self.journal is None or options is None or not options.resumable:
            return super().generate(request_id, prompt_token_ids, params, options)
        return self._recorded(self.journal, request_id, prompt_token_ids, params, options)

    async def _recorded(
        self,
        journal: Journal,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        options: RequestOptions,
    ) -> AsyncIterator[Delta]:
        name, requests = options.resumable, journal.requests
        resumed = requests.resume(name, params)
        if resumed is None:
            params = requests.begin(name, prompt, params)
        else:
            journal.resumed(1)
            prompt, params = resumed.prompt, resumed.params
            for delta in resumed.deltas:
                yield replace(delta, request_id=request_id)
            options = replace(options, known=resumed.known)
            if options.num_ended == params.n:
                return
        running = super().generate(request_id, prompt, params, options)
        try:
            async for delta in running:
                requests.record(name, delta)
                if self._flush_at is None:
                    self._flush_at = self._loop.call_later(FLUSH_S, self._flush)
                yield delta
        finally:
            close = getattr(running, "aclose", None)
            if close is not None:
                await close()

    def _flush(self) -> None:
        self._flush_at = None
        if self.journal is not None:
            self.journal.requests.flush()

    def stats(self) -> EngineStats:
        """As ``AsyncEngine``, with the journal's."""
        found = super().stats()
        return found if self.journal is None else replace(found, journal=self.journal.stats())

    async def stop(self, deadline_s: float) -> None:
        """As ``AsyncEngine``; the journal has its last word then."""
        await super().stop(deadline_s)
        if self.journal is not None:
            await asyncio.to_thread(self.journal.close)
