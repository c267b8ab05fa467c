"""A deterministic engine without a model, and a tokenizer trained on the spot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ds_cp.engine.handle import EngineInfo, EngineStats
from ds_cp.engine.params import Delta, SamplingParams, TokenLogprob

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of 400 tokens as transformers wraps it."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and counts one two three four five six "
    backend.train_from_iterator([text * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def expected_ids(prompt: list[int], count: int, vocab: int) -> list[int]:
    """What the fake engine answers: a walk over the ordinary tokens that the prompt starts."""
    first = len(SPECIAL)
    span = vocab - first
    start = sum(prompt) % span
    return [first + (start + 7 * step) % span for step in range(count)]


class FakeEngine:
    """An ``EngineHandle`` whose speed, failures and stops a test sets before it sends requests.

    ``delay_s`` comes before every token, ``first_delay_s`` before the first. ``refuse`` is raised
    before the first delta, ``break_after`` (n, error) after n tokens. ``end`` replaces the last
    finish reason.
    """

    def __init__(self, tokenizer: Any, max_model_len: int = 128) -> None:
        self.tokenizer = tokenizer
        self.info = EngineInfo(
            model="fake-model",
            max_model_len=max_model_len,
            vocab_size=len(tokenizer),
            kv_capacity_tokens=1024,
            largest_request_tokens=512,
            ranks=2,
            hosts=1,
            dtype="fp32",
            created=1_700_000_000,
        )
        self.state = "ready"
        self.snapshot = EngineStats()
        self.first_delay_s = 0.0
        self.delay_s = 0.0
        self.refuse: Exception | None = None
        self.break_after: tuple[int, Exception] | None = None
        self.end: str | None = None
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[Delta]:
        self.seen.append((prompt_token_ids, params))
        if self.refuse is not None:
            raise self.refuse
        self.live.add(request_id)
        finished = False
        try:
            room = self.info.max_model_len - len(prompt_token_ids)
            count = min(room, params.max_tokens or room)
            ids = expected_ids(prompt_token_ids, count, self.info.vocab_size)
            for step, token_id in enumerate(ids):
                await asyncio.sleep(self.delay_s + (self.first_delay_s if step == 0 else 0.0))
                if self.break_after is not None and step == self.break_after[0]:
                    raise self.break_after[1]
                delta = self._delta(request_id, token_id, params, step + 1 == count)
                finished = delta.finish_reason is not None
                yield delta
                if finished:
                    return
        finally:
            self.live.discard(request_id)
            if not finished and request_id not in self.aborted:
                self.aborted.append(request_id)

    def _delta(self, request_id: str, token_id: int, params: SamplingParams, last: bool) -> Delta:
        text = self.tokenizer.decode([token_id])
        logprobs = None
        if params.logprobs is not None:
            others = tuple((i, -1.0 - i) for i in range(params.logprobs))
            logprobs = (TokenLogprob(token_id, -0.5, others),)
        reason = (self.end or "length") if last else None
        for stop in params.stop:
            if stop in text:
                return Delta(request_id, (token_id,), "", logprobs, "stop", stop)
        return Delta(request_id, (token_id,), text, logprobs, reason)

    def abort(self, request_id: str) -> None:
        if request_id not in self.aborted:
            self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return self.snapshot
