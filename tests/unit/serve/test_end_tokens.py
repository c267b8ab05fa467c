"""The server's engine ends an answer at its tokenizer's end token too, which the worker's facts do
not know, and its start-up lines say which ids the model does not have."""

from __future__ import annotations

import asyncio
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ds_cp.config import load_config
from ds_cp.sampling_params import SamplingParams
from ds_cp.serve.async_engine import AsyncEngine
from ds_cp.serve.channel import Ready
from tests.unit.serve.test_async_engine import OneRank


def tokenizer(size: int, end: str) -> Any:
    """Tokens t0, t1, ..."""
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)


def answer(ends_with: Any) -> tuple[list[int], str | None, tuple[str, ...]]:
    """Tokens and reason of one request to a rank that draws token 7, and the start-up lines."""
    lines: list[str] = []

    async def main() -> tuple[list[int], str | None]:
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_ready(message: Ready) -> None:
            lines.extend(message.summary)
            loop.call_soon_threadsafe(ready.set)

        engine = AsyncEngine(
            load_config({"model": "pretended"}), "pretended", OneRank(), loop,  # type: ignore[arg-type]
            lambda: ends_with, on_ready, lambda err, code: None,
        )  # fmt: skip
        engine.start()
        await asyncio.wait_for(ready.wait(), 30)
        params = SamplingParams(max_tokens=5, temperature=0.0)
        tokens: list[int] = []
        reason = None
        async for delta in engine.generate("a", [1, 2, 3], params):
            tokens += delta.token_ids
            reason = delta.finish_reason
        await engine.stop(10)
        return tokens, reason

    tokens, reason = asyncio.run(main())
    return tokens, reason, tuple(lines)


def test_the_tokenizers_end_token_ends_an_answer() -> None:
    assert answer(tokenizer(50, "t7")) == ([7], "stop", ())


def test_another_end_token_does_not() -> None:
    assert answer(tokenizer(50, "t8")) == ([7] * 5, "length", ())
    assert answer(None) == ([7] * 5, "length", ())


def test_what_the_model_does_not_have_is_said_at_start() -> None:
    tokens, reason, lines = answer(tokenizer(60, "t55"))
    assert (tokens, reason) == ([7] * 5, "length")
    assert lines == (
        "end tokens 55 are ignored: the model's vocabulary has 50 tokens",
        "the tokenizer has 60 tokens, the model's vocabulary 50: a prompt with a token beyond it "
        "is refused",
    )
