"""An engine that says what a test wants, when it wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ds_cp.engine.interface import EngineStats
from ds_cp.outputs import Delta
from ds_cp.sampling_params import RequestOptions, SamplingParams
from tests.helpers.fake_engine import FakeEngine


class Scripted(FakeEngine):
    """``pieces`` are the texts of an answer's tokens. It waits for ``go`` before the first one,
    and ``between_s`` before each."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, 100_000)
        self.pieces = ["Hello", " there", "."]
        self.go = True
        self.between_s = 0.0
        self.ids: list[str] = []
        self.snapshot = EngineStats()

    def prompt(self, index: int = -1) -> str:
        """The text of a request's prompt, as the chat template has it."""
        return str(self.tokenizer.decode(self.seen[index][0]))

    def params(self, index: int = -1) -> SamplingParams:
        return self.seen[index][1]

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),  # noqa: B008 (frozen)
    ) -> AsyncIterator[Delta]:
        self.seen.append((prompt_token_ids, params))
        self.ids.append(request_id)
        if self.refuse is not None:
            raise self.refuse
        whole = False
        try:
            while not self.go:
                await asyncio.sleep(0.01)
            pieces = list(self.pieces)
            for i, text in enumerate(pieces):
                await asyncio.sleep(self.between_s)
                last = i + 1 == len(pieces)
                yield Delta(request_id, (5,), text, finish_reason="stop" if last else None)
            whole = True
        finally:
            if not whole:
                self.aborted.append(request_id)
