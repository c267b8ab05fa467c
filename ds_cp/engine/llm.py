"""The engine inside the caller's own processes: ``init_inference`` and ``generate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ds_cp.comm.failure import fail, failing
from ds_cp.comm.wire import World
from ds_cp.config import Config, load_config
from ds_cp.engine.collect import (
    OutputCollector,
    Prompt,
    PromptRequest,
    ReadyRequest,
    RequestFailure,
    as_list,
    one_each,
    progress_line,
)
from ds_cp.engine.core import EngineCore
from ds_cp.engine.loop import InlineLoop
from ds_cp.engine.sign_of_life import SignOfLife, idle_seconds
from ds_cp.errors import ConfigError, EngineDeadError, RequestError
from ds_cp.facts import Facts
from ds_cp.model.borrowed import Borrowed
from ds_cp.model.end_tokens import describe_tokenizer
from ds_cp.model.loading import load_tokenizer
from ds_cp.model.source import find_model
from ds_cp.model.wiring import Decoder
from ds_cp.outputs import RequestOutput
from ds_cp.plan import Stop
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.build import build_scheduler
from ds_cp.startup.agreement import local_phase
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import join_job
from ds_cp.startup.report import summary
from ds_cp.startup.resources import socket_environment
from ds_cp.topology.job import Job, detect
from ds_cp.worker.worker import Worker


def init_inference(
    model: Decoder | str | os.PathLike[str] | None = None,
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any | None = None,
    job: Job | None = None,
    env: Mapping[str, str] | None = None,
) -> LLMEngine:
    """An engine over all ranks of the job; every rank calls this with the same arguments.

    ``model``: a loaded transformers decoder (used as it is, weights and dtype, by one engine at a
    time; changes of its weights may go unseen until the next engine), a directory of safetensors, a
    GGUF file or a hub id; the config's when not given. ``config``: the JSON config as a path,
    mapping or ``Config``; an argument ``model`` replaces its own. ``tokenizer``: for a loaded
    model, when prompts are text. ``job``: this process's place, found from the launcher's
    environment when not given.

    Raises the typed errors of ``ds_cp.errors``, on every rank, when the job cannot start;
    ``ConfigError`` when neither ``model`` nor ``config`` names a model, or an engine uses it.
    """
    config = _with_model(config, model)
    if job is None:
        job = detect(os.environ if env is None else env, hosts=config.comm.hosts,
                     interface=config.comm.interface, timeout_s=config.comm.timeout_s,
                     port=config.comm.port, secret_file=config.comm.secret_file)  # fmt: skip
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    borrowed = Borrowed(model)
    with ExitStack() as undo:
        undo.enter_context(borrowed)
        world, threads = join_job(job, config)
        undo.callback(world.leave)
        with failing(world):
            if borrowed.model is None:  # only rank 0 needs a tokenizer; all learn if it has none
                wanted = world.rank == 0 and tokenizer is None
                found = local_phase(
                    world, lambda: load_tokenizer(find_model(config.model)) if wanted else None
                )
                tokenizer = tokenizer if found is None else found
            worker, facts = build_worker(world, config, borrowed.model, threads)
            engine = local_phase(  # a tokenizer may be of no use, on rank 0 alone
                world, lambda: LLMEngine(world, worker, facts, config, tokenizer, borrowed)
            )
        undo.pop_all()
        return engine


class LLMEngine:
    """Generates on rank 0 (the driver); the other ranks follow inside the same calls."""

    def __init__(
        self,
        world: World,
        worker: Worker,
        facts: Facts,
        config: Config,
        tokenizer: Any | None,
        borrowed: Borrowed | None = None,
    ) -> None:
        self.facts = facts = facts.with_tokenizer(*describe_tokenizer(tokenizer))
        self.tokenizer = tokenizer
        self._world: World | None = world
        self._worker = worker
        self._config = config
        self._borrowed = borrowed or Borrowed(None)
        self._state = "ready"  # or "running", or "failed"
        self._core: EngineCore | None = None
        if self.is_driver:
            self._core = EngineCore(build_scheduler(config, facts, paced=False), tokenizer)

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
        options: RequestOptions | Sequence[RequestOptions] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (text, token ids, or a list of either), batched; outputs in their order.

        Every rank calls it; ranks other than 0 take part and return an empty list. ``params`` and
        ``options``: one for all or one per prompt. Raises ``RequestError`` before anything runs
        when a prompt or a parameter is not acceptable. ``progress`` shows a line on stderr when
        that is a terminal.
        """

        def requests() -> list[PromptRequest]:
            texts = as_list(prompts)
            return [
                PromptRequest(str(n), prompt, how, more)
                for n, (prompt, how, more) in enumerate(zip(
                    texts, one_each(params, SamplingParams(), len(texts), "sampling params"),
                    one_each(options, RequestOptions(), len(texts), "options"), strict=True,
                ))
            ]  # fmt: skip

        found: dict[str, RequestOutput] = {}
        order: list[str] = []
        show: Callable[[int], None] | None = None

        def checked() -> Iterator[ReadyRequest]:
            ready = [self._prepare(request) for request in requests()]
            for one in ready:
                self._driver.scheduler.fit_max_tokens(len(one.tokens), one.params)
            order.extend(one.request_id for one in ready)
            nonlocal show
            if progress and sys.stderr.isatty():
                show = progress_line(len(ready))
            yield from ready

        for output in self._run(checked()):
            assert isinstance(output, RequestOutput)
            found[output.request_id] = output
            if show:
                show(len(found))
        return [found[name] for name in order]

    def stream(self, requests: Iterable[PromptRequest]) -> Iterator[RequestOutput | RequestFailure]:
        """Outputs as they finish. Reads ``requests`` only as fast as they can be queued, so there
        may be any number of them. One that is not acceptable gives a ``RequestFailure`` and the
        others go on.

        Every rank iterates over it; on ranks other than 0 ``requests`` is not read and nothing is
        yielded. Stopping early ends the requests that still run. The caller may take any time
        between two outputs, and ``requests`` to give the next one. Between two outputs ``drain``,
        ``reopen`` and ``rebalance`` may be called on rank 0.
        """

        def prepared() -> Iterator[ReadyRequest | RequestFailure]:
            for request in requests:
                try:
                    yield self._prepare(request)
                except RequestError as err:
                    yield RequestFailure(request.request_id, err)

        return self._run(prepared())

    def drain(self, rank: int) -> None:
        """Begin to move everything off a rank, live, as in ``EngineInterface``. On rank 0 only."""
        self._driver.scheduler.drain(rank)

    def reopen(self, rank: int) -> None:
        """Let a drained rank take KV again."""
        self._driver.scheduler.reopen(rank)

    def rebalance(self) -> int:
        """Move blocks from full ranks to empty ones; returns how many will move."""
        return self._driver.scheduler.rebalance()

    @property
    def _driver(self) -> EngineCore:
        if self._core is None:
            raise RuntimeError("only rank 0 decides; call this where is_driver is true")
        return self._core

    def _run(
        self, requests: Iterable[ReadyRequest | RequestFailure]
    ) -> Iterator[RequestOutput | RequestFailure]:
        if self._world is None:
            raise RuntimeError("generate after shutdown")
        if self._state == "running":
            raise RequestError(
                "another generate or stream of this engine is under way; finish or close it first"
            )
        if self._state == "failed":
            raise EngineDeadError(
                "a step of an earlier call failed, "
                "so not all KV that counts as computed may be there; "
                "shut this engine down and make a new one"
            )
        self._state = "running"
        if not self.is_driver:
            try:
                self._worker.follow()
            finally:
                self._state = "ready" if self._world.failure is None else "failed"
            return
        limit_s = self._config.comm.timeout_s
        alive = SignOfLife(
            self._worker.lead, idle_seconds(limit_s) if self._world.size > 1 else None
        )
        loop = InlineLoop(self._driver, alive.lead)
        live: dict[str, OutputCollector] = {}
        failure: BaseException | None = None
        try:
            yield from self._drive(iter(requests), loop, live, alive)
        except BaseException as err:
            failure = err
            raise
        finally:
            for name in live:
                self._driver.abort(name)
            self._end(loop, alive, failure)

    def _end(self, loop: InlineLoop, alive: SignOfLife, failure: BaseException | None) -> None:
        """After a run: release the other ranks, or after a failed step give them its cause. No
        collective follows a failure."""
        world = self._worker.world
        try:
            alive.close()  # from here on this thread alone talks to the other ranks
            loop.settle()
        except BaseException as err:
            failure = err
            raise
        finally:
            if loop.failed or isinstance(failure, EngineDeadError) or world.failure is not None:
                self._state = "failed"
                fail(world, failure or EngineDeadError("a step failed"))
            else:
                self._worker.lead(Stop())
                self._state = "ready"

    def _drive(
        self,
        requests: Iterator[ReadyRequest | RequestFailure],
        loop: InlineLoop,
        live: dict[str, OutputCollector],
        alive: SignOfLife,
    ) -> Iterator[RequestOutput | RequestFailure]:
        core, room = self._driver, self._config.scheduler.max_queue
        more = True
        while more or core.has_work or loop.num_in_flight:
            while more and len(core.scheduler.waiting) < room:
                with alive.away():
                    one = next(requests, None)
                if one is None:
                    more = False
                elif isinstance(one, RequestFailure):
                    with alive.away():
                        yield one
                else:
                    try:
                        live[one.request_id] = OutputCollector(one.add_to(core), one.text)
                    except RequestError as err:
                        with alive.away():
                            yield RequestFailure(one.request_id, err)
            for delta in loop.advance():
                collector = live[delta.request_id]
                collector.add(delta)
                if collector.is_done:
                    del live[delta.request_id]
                    with alive.away():
                        yield collector.output()
        core.check_integrity()

    def _prepare(self, request: PromptRequest) -> ReadyRequest:
        prompt, text = request.prompt, None
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "a text prompt needs a tokenizer: "
                    "pass tokenizer= to init_inference, or token ids",
                    "prompt",
                )
            try:
                text, tokens = prompt, list(self.tokenizer(prompt)["input_ids"])
            except Exception as err:  # as of half a surrogate pair; it concerns this request alone
                raise RequestError(
                    f"the tokenizer cannot encode the prompt ({type(err).__name__}: {err})",
                    "prompt",
                ) from err
        else:
            tokens = [_token(t) for t in prompt]
        self._driver.check(tokens, request.params)
        return ReadyRequest.of(request, text, tokens, self._driver.grammar_of(request.params))

    def shutdown(self) -> None:
        """Leave the job. Every rank calls it; calling it again does nothing. A model object that
        the caller brought works with transformers alone again."""
        if self._world is not None:
            if self._core is not None:
                self._core.close()
            self._borrowed.give_back()
            self._world = None
            self._worker.leave(self._state == "ready")


def _with_model(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None,
    model: Decoder | str | os.PathLike[str] | None,
) -> Config:
    """The checked config, its ``model`` replaced by the name of ``model`` where that has one."""
    if model is None and (not config or isinstance(config, Mapping) and not config.get("model")):
        raise ConfigError(
            "no model: give init_inference a model, or a config whose model names one"
        )
    name = model.config.name_or_path if isinstance(model, Decoder) else os.fspath(model or "")
    if isinstance(config, Config):
        return config.model_copy(update={"model": name}) if name else config
    return load_config(config or {}, {"model": name or "a loaded model"} if model else {})


def _token(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"a prompt is text or token ids, not {value!r}", "prompt")
    return value
