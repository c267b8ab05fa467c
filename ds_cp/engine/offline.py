"""The engine inside the caller's own processes: ``init_inference`` and ``generate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from ds_cp.comm.wire import World
from ds_cp.config import Config, load_config
from ds_cp.engine.core import EngineCore
from ds_cp.engine.decisions import build_scheduler, summary
from ds_cp.engine.params import (
    CompletionOutput,
    Delta,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from ds_cp.engine.plan import StepPlan, encode_plan
from ds_cp.engine.process import socket_environment
from ds_cp.engine.request import Request
from ds_cp.engine.startup import build_worker, join_job
from ds_cp.engine.startup_facts import Facts
from ds_cp.engine.worker import Worker
from ds_cp.errors import RequestError
from ds_cp.model.loading import load_tokenizer
from ds_cp.model.source import ModelSource, find_model
from ds_cp.model.wiring import Decoder
from ds_cp.topology.job import Job, detect

Prompt = str | Sequence[int]


def init_inference(
    model: Decoder | str | os.PathLike[str],
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any | None = None,
    job: Job | None = None,
    env: Mapping[str, str] | None = None,
) -> LLMEngine:
    """An engine over all ranks of the job; every rank calls this with the same arguments.

    ``model``: a loaded transformers decoder (used as it is, weights and dtype), a directory of
    safetensors, a GGUF file or a hub id. ``config``: the JSON config as a path, mapping or
    ``Config``; its ``model`` gives way to the argument. ``tokenizer``: for a loaded model, when
    prompts are text. ``job``: this process's place, found from the launcher's environment when not
    given.

    Raises the typed errors of ``ds_cp.errors``, on every rank, when the job cannot start.
    """
    name = model.config.name_or_path if isinstance(model, Decoder) else os.fspath(model)
    if isinstance(config, Config):
        config = config.model_copy(update={"model": name}) if name else config
    else:
        config = load_config(config or {}, {"model": name or "a loaded model"})
    if job is None:
        job = detect(os.environ if env is None else env, hosts=config.comm.hosts,
                     interface=config.comm.interface, timeout_s=config.comm.timeout_s)  # fmt: skip
    source: Decoder | ModelSource | None = None  # looked up where its absence can be reported
    if isinstance(model, Decoder):
        source = model
    elif job.rank == 0:
        source = find_model(config.model)
        tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    before = model.config._attn_implementation if isinstance(model, Decoder) else None
    world, threads = join_job(job, config)
    try:
        worker, facts = build_worker(world, config, source, threads)
    except BaseException:
        world.leave()
        raise
    return LLMEngine(world, worker, facts, config, tokenizer, before)


class LLMEngine:
    """Generates on rank 0 (the driver); the other ranks follow inside the same calls."""

    def __init__(
        self,
        world: World,
        worker: Worker,
        facts: Facts,
        config: Config,
        tokenizer: Any | None,
        attention_before: str | None = None,
    ) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        self._world: World | None = world
        self._worker = worker
        self._config = config
        self._attention_before = attention_before  # what a model of the caller's is given back
        self._numbers = 0
        self._core: EngineCore | None = None
        if self.is_driver:
            self._core = EngineCore(build_scheduler(config, facts), tokenizer)

    @property
    def is_driver(self) -> bool:
        """Whether this is rank 0, which has the outputs."""
        return self._worker.world.rank == 0

    def summary(self) -> list[str]:
        """What start-up decided, a line each."""
        return summary(self._config, self.facts)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts (text, token ids, or a list of either), batched; outputs in their order.

        Every rank calls it; ranks other than 0 take part and return an empty list. ``params``: one
        for all or one per prompt. Raises ``RequestError`` before anything runs when a prompt or a
        parameter is not acceptable. ``progress`` shows a line on stderr when that is a terminal.
        """
        if self._world is None:
            raise RuntimeError("generate after shutdown")
        if not self.is_driver:
            self._worker.follow()
            return []
        core = self._core
        assert core is not None
        try:
            return self._drive(core, prompts, params, progress)
        finally:
            for request in [*core.scheduler.running, *core.scheduler.waiting]:
                core.abort(request.request_id)
            self._worker.control.broadcast(encode_plan(StepPlan(0, "stop")))

    def _drive(
        self,
        core: EngineCore,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        texts, ids = self._tokenize(prompts)
        each = self._params(params, len(ids))
        for tokens, how in zip(ids, each, strict=True):
            core.check(tokens, how)
        results: dict[str, _Collector] = {}
        waiting = list(zip(texts, ids, each, strict=True))[::-1]
        show = _progress(len(ids)) if progress and sys.stderr.isatty() else None
        room = self._config.scheduler.max_queue
        while waiting or core.has_work:
            while waiting and len(core.scheduler.waiting) < room:
                text, tokens, how = waiting.pop()
                name = str(self._numbers)
                self._numbers += 1
                results[name] = _Collector(core.add(name, tokens, how), text)
            plan = core.plan()
            for delta in core.apply(self._worker.lead(plan)) if plan else []:
                results[delta.request_id].take(delta)
            if show:
                show(sum(1 for r in results.values() if r.request.finish_reason))
        return [result.output() for result in results.values()]

    def _tokenize(
        self, prompts: Prompt | Sequence[Prompt]
    ) -> tuple[list[str | None], list[list[int]]]:
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [cast(Prompt, prompts)]
        texts: list[str | None] = []
        ids: list[list[int]] = []
        for prompt in cast(Sequence[Prompt], prompts):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise RequestError(
                        "a text prompt needs a tokenizer: pass tokenizer= to init_inference, or "
                        "token ids",
                        "prompt",
                    )
                texts.append(prompt)
                ids.append(list(self.tokenizer(prompt)["input_ids"]))
            else:
                texts.append(None)
                ids.append([_token(t) for t in prompt])
            if not ids[-1]:
                raise RequestError("the prompt is empty; give at least one token", "prompt")
        return texts, ids

    @staticmethod
    def _params(
        params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            return [SamplingParams()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise RequestError(
                f"{count} prompts but {len(params)} sampling params: give one or as many"
            )
        return list(params)

    def shutdown(self) -> None:
        """Leave the job. Every rank calls it; calling it again does nothing. A model object that
        the caller brought works with transformers alone again."""
        if self._world is not None:
            if self._attention_before is not None:
                self._worker.model.set_attn_implementation(self._attention_before)
            self._world.leave()
            self._world = None


class _Collector:
    """Gathers one request's deltas into its output."""

    def __init__(self, request: Request, prompt: str | None) -> None:
        self.request = request
        self._prompt = prompt
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, delta: Delta) -> None:
        self._tokens += delta.token_ids
        self._text.append(delta.text)
        self._logprobs += delta.logprobs or ()

    def output(self) -> RequestOutput:
        request = self.request
        completion = CompletionOutput(
            index=0,
            text="".join(self._text),
            token_ids=tuple(self._tokens),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=tuple(self._logprobs) if request.params.logprobs is not None else None,
        )
        return RequestOutput(
            request.request_id, self._prompt, request.prompt, (completion,), True, request.metrics()
        )


def _token(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"a prompt is text or token ids, not {value!r}", "prompt")
    return value


def _progress(total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} requests", end=end, file=sys.stderr, flush=True)

    return show
