"""Rank 0's engine for the HTTP application: a thread runs the steps, asyncio iterators yield the
deltas.

The scheduler lives in this process; plans go to the worker through a link, the next one while a
step runs. A long step blocks only the engine's thread: requests are admitted, refused and aborted
meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from ds_cp.config import Config
from ds_cp.engine.core import EngineCore
from ds_cp.engine.interface import EngineHealth, EngineInfo, EngineStats
from ds_cp.engine.loop import PipelinedLoop
from ds_cp.engine.observer import Observer
from ds_cp.engine.picture import Picture
from ds_cp.engine.sign_of_life import idle_seconds
from ds_cp.engine.wire_model import WireModel
from ds_cp.errors import DsCpError, EngineDeadError, RequestError, StoppingError
from ds_cp.outputs import Delta, EndedRequest, PromptProgress
from ds_cp.plan import Idle
from ds_cp.sampling_params import RequestOptions, SamplingParams
from ds_cp.scheduler.build import grid_of
from ds_cp.serve.channel import Ready
from ds_cp.serve.grammar_checks import GrammarChecks
from ds_cp.serve.mailboxes import Mailbox, Mailboxes
from ds_cp.serve.ready_facts import info_of, load
from ds_cp.serve.standing import Standing
from ds_cp.serve.timed_link import TimedLink
from ds_cp.serve.worker_link import InterruptedStepsError, WorkerLink
from ds_cp.templates.chat import ChatTemplate
from ds_cp.templates.processes import TemplateProcesses


class AsyncEngine:
    """Implements ``EngineInterface`` over a worker.

    ``load_tokenizer`` runs in the engine's thread while the worker starts. ``paced``: clients wait
    for each token, so prefill is throttled while other requests decode. ``is_mending``: as in
    ``Standing``. ``on_ready`` gets the start-up lines; ``on_death`` the error that ended the engine
    and the exit code, but not after ``stop`` or ``fail``. Both run in the engine's thread.

    A deliberate end: ``refuse_new`` while requests may finish, ``cut`` to tell those that have not,
    ``stop``. From ``cut`` on, whatever ends a request is a ``StoppingError``.
    """

    info: EngineInfo
    tokenizer: Any
    chat_template: ChatTemplate

    def __init__(
        self,
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
        self._config = config
        self._model_name = model_name
        self._link = link
        self._load_tokenizer = load_tokenizer
        self._on_ready = on_ready
        self._on_death = on_death
        self._paced = paced
        self._core: EngineCore | None = None
        self._observer: Observer | None = None
        self._lock = threading.Lock()  # guards core and mailboxes; not held during a step
        self._wake = threading.Condition(self._lock)
        self._standing = Standing(is_mending, config.server.stall_s)
        self._stopping = False  # the loop of steps ends
        self._mailboxes = Mailboxes(loop)
        self._worked = False  # since the ledger was last checked
        self._served = 0  # the generation of ranks that the core knows
        self._steps = TimedLink(link)
        self.num_strangers = 0  # who came to the ranks' port, and was not of the job
        self._templates = TemplateProcesses()
        self._checks = GrammarChecks()
        self._listeners: list[Callable[[EndedRequest], None]] = []
        self._thread = threading.Thread(target=self._run, name="ds_cp engine", daemon=True)

    def start(self) -> None:
        """Begin to wait for the worker and then to step."""
        self._thread.start()

    def on_ended(self, listener: Callable[[EndedRequest], None]) -> None:
        """As ``EngineInterface`` says."""
        self._listeners.append(listener)

    @property
    def state(self) -> str:
        """As ``EngineInterface`` says."""
        return self._standing.state(self._steps.age_s)

    @property
    def health(self) -> EngineHealth:
        """As ``EngineInterface`` says. Takes no lock."""
        state, core = self.state, self._core
        if core is None:
            return EngineHealth(state)
        away = tuple(sorted(core.scheduler.block_manager.away))
        return EngineHealth(state, core.scheduler.door.is_overloaded, away)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise ``RequestError`` for a request that is not acceptable. Takes no lock."""
        self._ready_core().check(prompt_token_ids, params)

    def check_room(self, options: RequestOptions, answers: int = 1) -> None:
        """As ``EngineInterface`` says."""
        with self._lock:
            self._ready_core().scheduler.door.enter(options, answers)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions | None = None,
    ) -> AsyncIterator[Delta]:
        """Deltas until the last one of every answer; closing the iterator aborts the request. A
        refusal is raised before the first delta."""
        mailbox: Mailbox = asyncio.Queue()
        prompt = tuple(prompt_token_ids)  # copied before the lock is taken
        checker = self._ready_core().grammars
        try:
            grammar = await self._checks.check(checker, params.structured_outputs)
        except RequestError:
            self._ready_core()  # while the engine ends, that is why
            raise
        with self._wake:
            self._ready_core().add(request_id, prompt, params, options, grammar)
            self._mailboxes.open(request_id, mailbox)
            self._wake.notify()
        unfinished = params.n - (options.num_ended if options is not None else 0)
        try:
            while unfinished:
                delta = await mailbox.get()
                if isinstance(delta, DsCpError):
                    raise delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            self.abort(request_id)

    def progress(self, request_id: str) -> PromptProgress | None:
        """As ``EngineInterface`` says."""
        with self._lock:
            return self._core.progress(request_id) if self._core is not None else None

    def abort(self, request_id: str) -> None:
        """End a request that has not finished; its blocks are free before the next step."""
        with self._lock:
            self._mailboxes.close(request_id)
            if self._core is not None and self._core.abort(request_id):
                self._tell_ended(self._core)

    def drain(self, rank: int) -> None:
        """Begin to move everything off a rank, live; see ``EngineInterface``."""
        with self._wake:
            self._ready_core().scheduler.drain(rank)
            self._wake.notify()

    def reopen(self, rank: int) -> None:
        """Let a drained rank take KV again."""
        with self._wake:
            self._ready_core().scheduler.reopen(rank)

    def rebalance(self) -> int:
        """Move blocks from full ranks to empty ones; returns how many will move."""
        with self._wake:
            return self._ready_core().scheduler.rebalance()

    def reset_prefix_cache(self) -> int:
        """Forget every prefix; see ``EngineInterface``."""
        with self._wake:
            return self._ready_core().scheduler.reset_prefix_cache()

    def _ready_core(self) -> EngineCore:
        self._standing.check()
        assert self._core is not None
        return self._core

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges."""
        with self._lock:
            if self._core is None:
                return EngineStats()
            return replace(
                self._core.stats(),
                num_strangers=self.num_strangers,
                step_seconds=self._steps.seconds,
                step_age_seconds=0.0 if self._standing.is_dead else self._steps.age_s,
                comm_bytes={scheme: sent[0] for scheme, sent in self._link.sent.items()},
                comm_exchanges={scheme: sent[1] for scheme, sent in self._link.sent.items()},
            )

    def picture(self) -> Picture | None:
        """As ``EngineInterface`` says."""
        seen = self._observer
        return None if seen is None else seen.picture(self._steps.seconds, self._link.sent)

    # --- the end; called in the event loop

    def refuse_new(self) -> None:
        """New requests raise ``StoppingError`` from now on; those that were taken go on."""
        self._standing.is_refusing = True

    def cut(self) -> None:
        """Every unfinished request raises ``StoppingError``, at once, whatever the ranks do."""
        self._standing.is_refusing = self._standing.is_cut = True
        self._end_requests(StoppingError("the server is stopping; this request was not finished"))

    def fail(self, message: str) -> None:
        """A rank has failed, which the worker may notice late: every request raises
        ``EngineDeadError``, at once, also during a drain, unless it was told of the stop."""
        standing = self._standing
        if standing.is_cut:
            return
        standing.has_failed = standing.is_refusing = standing.is_dead = True
        self._end_requests(EngineDeadError(message))

    def _end_requests(self, err: EngineDeadError) -> None:
        with self._lock:
            unfinished = self._mailboxes.all()
        for mailbox in unfinished:
            mailbox.put_nowait(err)

    async def stop(self, deadline_s: float) -> None:
        """End the engine: all ranks leave after the current step, and every unfinished request
        raises ``StoppingError``.

        Returns when the stop plan was sent, at the latest after ``deadline_s``.
        """
        self.cut()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        limit = time.monotonic() + deadline_s
        while self._thread.is_alive() and time.monotonic() < limit:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._templates.close)
        await self._checks.close(None if self._core is None else self._core.grammars)

    # --- the engine's thread

    def _run(self) -> None:
        try:
            self._become_ready()
            self._loop_steps()
        except DsCpError as err:
            self._die(err, err.exit_code)
        except Exception as err:  # a fault of ds_cp: report it rather than hang
            self._die(EngineDeadError(f"{type(err).__name__}: {err}"), 1)

    def _become_ready(self) -> None:
        loaded = load(self._config, self._link, self._load_tokenizer, self._templates, self._paced)
        ready, scheduler = loaded.ready, loaded.scheduler
        with self._lock:
            self._core = EngineCore(scheduler, loaded.tokenizer, WireModel.of(ready.facts))
            hosts = grid_of(ready.facts).cp_topology().hosts
            self._observer = Observer(self._core, hosts, self._lock)
            self.tokenizer = loaded.tokenizer
            self.chat_template = loaded.chat_template
            self.info = info_of(self._model_name, ready.facts, scheduler)
            self._standing.is_loaded = True
        self._on_ready(ready)

    def _loop_steps(self) -> None:
        idle_s = idle_seconds(self._config.comm.timeout_s)
        core = self._core
        assert core is not None
        loop = PipelinedLoop(core, self._steps, self._lock)
        while not self._stopping:
            try:
                self._turn(core, loop, idle_s)
            except InterruptedStepsError as err:
                self._recover(core, loop, str(err))
        self._standing.is_dead = True
        loop.settle()
        self._link.leave()

    def _turn(self, core: EngineCore, loop: PipelinedLoop, idle_s: float) -> None:
        """One step, or the wait for something to do."""
        with self._wake:
            idle = not core.has_work and not loop.num_in_flight
            if idle and not self._stopping:
                if self._worked:
                    core.check_integrity()
                    self._worked = False
                self._wake.wait(timeout=idle_s)
                idle = not core.has_work
            if self._stopping:
                return
        if idle:  # within comm.timeout_s, so that no rank gives rank 0 up
            self._steps.submit(Idle())
            self._steps.outcome()
            return
        self._worked = True
        deltas = loop.advance()
        with self._lock:
            addressed = self._mailboxes.addressed(deltas)
            self._tell_ended(core)
        self._mailboxes.deliver(addressed)

    def _recover(self, core: EngineCore, loop: PipelinedLoop, cause: str) -> None:
        """The ranks have left: wait until they have met again, go on from what is certain."""
        loop.forget()
        self._steps.forget()
        self._standing.is_interrupted = True
        resumed = self._link.resume()
        with self._lock:
            ends, refused = core.recover(resumed.lost_since(self._served), resumed.away, cause)
            self._mailboxes.deliver(self._mailboxes.addressed(ends))
            self._mailboxes.refuse(refused)
        self._served = resumed.generation
        self._standing.is_interrupted = False

    def _tell_ended(self, core: EngineCore) -> None:
        """Tell the listeners, in the event loop. The lock is held."""
        ended = core.tally.take_ended()

        def tell() -> None:
            for one in ended:
                for listener in self._listeners:
                    listener(one)

        if ended and self._listeners:
            self._mailboxes.call(tell)

    def _die(self, err: DsCpError, exit_code: int) -> None:
        with self._lock:
            self._standing.is_dead = True
            mailboxes = self._mailboxes.all()
        if self._standing.has_failed:
            return  # reported already
        kind = StoppingError if self._standing.is_cut else EngineDeadError
        self._mailboxes.deliver([(mailbox, kind(str(err))) for mailbox in mailboxes])
        if not self._stopping:
            self._on_death(err, exit_code)
