"""A deterministic engine without a model, and a tokenizer trained on the spot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ds_cp.engine.interface import EngineHealth, EngineInfo, EngineStats
from ds_cp.engine.picture import Picture
from ds_cp.errors import CapacityError, QueueFullError, RequestError
from ds_cp.outputs import Delta, EndedRequest, PackedLogprobs, PromptProgress, TokenLogprob
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.admission import Limits, check_request
from ds_cp.templates.chat import ChatTemplate
from ds_cp.templates.processes import TemplateProcesses

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


@cache
def template_processes() -> TemplateProcesses:
    """One for all fake engines of this process, since its start takes half a second. It starts with
    the first chat, and ends with this process."""
    return TemplateProcesses()


def expected_ids(prompt: list[int], count: int, vocab: int, index: int = 0) -> list[int]:
    """The fake engine's answer: a walk over the ordinary tokens, from a start that depends on the
    prompt and the answer's index."""
    first = len(SPECIAL)
    span = vocab - first
    start = (sum(prompt) + 31 * index) % span
    return [first + (start + 7 * step) % span for step in range(count)]


def prompt_scores(prompt: list[int], top: int) -> tuple[TokenLogprob | None, ...]:
    """The fake engine's log-probabilities of a prompt: -0.25 times the position for each token, and
    the ``top`` most likely ones, the token itself first."""
    return (None, *(score_of(prompt, position, top) for position in range(1, len(prompt))))


def score_of(prompt: list[int], position: int, top: int) -> TokenLogprob:
    token_id = prompt[position]
    others = ((token_id, -0.25 * position), *((i, -50.0 - i) for i in range(top)))
    return TokenLogprob(token_id, -0.25 * position, others[:top])


class FakeEngine:
    """An ``EngineInterface``; a test sets its speed, failures and stops before it sends requests.

    ``delay_s`` comes before every token, ``first_delay_s`` before the first; ``eager_s`` is the
    delay of requests with ``ignore_eos``, so that an attack can be quicker. ``refuse`` is raised
    before the first delta (``refuses_early``: by ``check_room``), ``break_after`` (n, error) after
    n tokens. ``end`` replaces the last finish reason, with ``end_cause`` as its cause.
    ``open_tokens`` are what an answer without ``max_tokens`` has, else as many as fit. ``short``
    gives answers (by index) that stop after that many tokens; in each step the
    answers come in their order, or ``backwards``. ``cached`` is how many tokens of every prompt
    were in the prefix cache. ``drained`` ranks cannot all be drained, and hold ``blocks`` (by rank)
    until a test takes them away; ``moving`` is what a rebalance says,
    ``prefix_blocks`` what a reset of the prefix cache frees.
    """

    def __init__(self, tokenizer: Any, max_model_len: int = 128) -> None:
        self.tokenizer = tokenizer
        self.chat_template = ChatTemplate(tokenizer, template_processes())
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
        self.shown: Picture | None = None  # what ``picture`` says
        self.listeners: list[Callable[[EndedRequest], None]] = []
        self.looks = 0  # how often it was asked
        self._thread = ThreadPoolExecutor(1)
        self.first_delay_s = 0.0
        self.steps_of_prompt: list[
            PromptProgress
        ] = []  # what ``progress`` says, before the first token
        self.delay_s = 0.0
        self.eager_s: float | None = None
        self.refuse: Exception | None = None
        self.refuses_early = False  # by ``check_room``
        self.overloaded, self.away = False, tuple[int, ...]()  # as /health says
        self.end_cause: str | None = None  # the ``stop_reason`` that goes with ``end``
        self.break_after: tuple[int, Exception] | None = None
        self.open_tokens: int | None = None
        self.end: str | None = None
        self.short: dict[int, int] = {}
        self.backwards = False
        self.cached: int | None = None
        self.moving = 0
        self.prefix_blocks = 0
        self.drained: set[int] = set()
        self.blocks: dict[int, int] = {}
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.options: list[RequestOptions] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        info = self.info
        limits = Limits(info.max_model_len, 64, 8192, 1000, info.vocab_size, ())
        check_request(limits, prompt_token_ids, params)

    @property
    def health(self) -> EngineHealth:
        return EngineHealth(self.state, self.overloaded, self.away)

    def check_room(self, options: RequestOptions, answers: int = 1) -> None:
        if isinstance(self.refuse, QueueFullError) and self.refuses_early:
            raise self.refuse

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),  # noqa: B008 (frozen)
    ) -> AsyncIterator[Delta]:
        self.seen.append((prompt_token_ids, params))
        self.options.append(options)
        if self.refuse is not None:
            raise self.refuse
        self.live.add(request_id)
        left = set(range(params.n))
        try:
            room = self.info.max_model_len - len(prompt_token_ids)
            count = min(room, params.max_tokens or self.open_tokens or room)
            vocab = self.info.vocab_size
            total = [sum(prompt_token_ids)]  # as good as the prompt, and soon added up
            walks = [expected_ids(total, count, vocab, i) for i in range(params.n)]
            offsets = [0] * params.n  # characters of each answer before its next token
            eager = params.ignore_eos and self.eager_s is not None
            delay_s = (self.eager_s or 0.0) if eager else self.delay_s
            for step in range(count):
                await asyncio.sleep(delay_s + (self.first_delay_s if step == 0 else 0.0))
                while step == 0 and self.steps_of_prompt:
                    await asyncio.sleep(0.01)
                if self.break_after is not None and step == self.break_after[0]:
                    raise self.break_after[1]
                for index in sorted(left, reverse=self.backwards):
                    token_id, last = walks[index][step], step + 1 == count
                    delta = self._delta(request_id, token_id, params, offsets[index], last)
                    offsets[index] += len(self.tokenizer.decode([token_id]))
                    if self.short.get(index) == step + 1:
                        delta = replace(delta, finish_reason="stop")
                    if step == 0 and index == 0:
                        about = (delta, prompt_token_ids, params)
                        if len(prompt_token_ids) < 1000:
                            delta = self._with_prompt(*about)
                        else:  # as in the real engine: in a thread, one of them
                            loop = asyncio.get_running_loop()
                            delta = await loop.run_in_executor(
                                self._thread, self._with_prompt, *about
                            )
                    if delta.finish_reason is not None:
                        left.discard(index)
                        self._tell(delta, prompt_token_ids, options, index, step + 1)
                    yield replace(delta, index=index)
                if not left:
                    return
        finally:
            self.live.discard(request_id)
            if left and request_id not in self.aborted:
                self.aborted.append(request_id)

    def _with_prompt(self, delta: Delta, prompt: list[int], params: SamplingParams) -> Delta:
        scores = None
        if params.prompt_logprobs is not None:
            top = params.prompt_logprobs
            later = (score_of(prompt, position, top) for position in range(1, len(prompt)))
            scores = PackedLogprobs.of(chain([None], later))
        return replace(delta, cached_tokens=self.cached, prompt_logprobs=scores)

    def _delta(
        self, request_id: str, token_id: int, params: SamplingParams, offset: int, last: bool
    ) -> Delta:
        text = self.tokenizer.decode([token_id])
        logprobs = None
        if params.logprobs is not None:
            others = tuple((i, -1.0 - i) for i in range(params.logprobs))
            logprobs = (TokenLogprob(token_id, -0.5, others, offset),)
        reason = (self.end or "length") if last else None
        for stop in params.stop:
            if stop in text:
                return Delta(request_id, (token_id,), "", logprobs, "stop", stop)
        cause = self.end_cause if last else None
        return Delta(request_id, (token_id,), text, logprobs, reason, cause)

    def _tell(
        self, last: Delta, prompt: list[int], options: RequestOptions, index: int, new: int
    ) -> None:
        """As the engine does when an answer ends. Half a second of each time."""
        gaps = 0.5 if new > 1 else None
        ended = EndedRequest(
            last.request_id, index, options.http_id, str(last.finish_reason), len(prompt),
            self.cached or 0, new, 0, ("local",), (0,), 0.5, 0.5, 0.5, 0.5, gaps, 1.5,
        )  # fmt: skip
        for listener in self.listeners:
            listener(ended)

    def on_ended(self, listener: Callable[[EndedRequest], None]) -> None:
        self.listeners.append(listener)

    def abort(self, request_id: str) -> None:
        if request_id not in self.aborted:
            self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        if not self.drained:
            return self.snapshot
        used = tuple(self.blocks.get(rank, 0) for rank in range(self.info.ranks))
        return replace(
            self.snapshot,
            kv_blocks_used=used,
            kv_blocks_total=(8,) * self.info.ranks,
            ranks_drained=tuple(sorted(self.drained)),
            ranks_draining=tuple(rank for rank in sorted(self.drained) if used[rank]),
        )

    def picture(self) -> Picture | None:
        self.looks += 1
        return self.shown

    def drain(self, rank: int) -> None:
        self._check(rank)
        if len(self.drained | {rank}) == self.info.ranks:
            raise CapacityError("the other ranks cannot hold it", need=300, have=0, largest=0)
        self.drained.add(rank)

    def reopen(self, rank: int) -> None:
        self._check(rank)
        self.drained.discard(rank)

    def rebalance(self) -> int:
        return self.moving

    def progress(self, request_id: str) -> PromptProgress | None:
        """What a test says, one after the other, while the first token is awaited."""
        return self.steps_of_prompt.pop(0) if self.steps_of_prompt else None

    def reset_prefix_cache(self) -> int:
        freed, self.prefix_blocks = self.prefix_blocks, 0
        return freed

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.info.ranks:
            raise RequestError(f"there is no rank {rank}; ranks are 0 to 1")
