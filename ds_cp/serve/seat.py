"""The place of a rank's worker, in its supervisor: a worker is started there, asked and heard, and
after its death another one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType

from ds_cp.config import Config
from ds_cp.errors import DsCpError, EngineDeadError
from ds_cp.facts import Facts
from ds_cp.log_stream import say
from ds_cp.serve.channel import Channel
from ds_cp.serve.detached import WorkerProcess, can_fork_servers
from ds_cp.serve.forking import Forks
from ds_cp.serve.oom_kills import OomKills
from ds_cp.serve.orders import Order, Ping, Pong, Word
from ds_cp.serve.worker_child import Child, describe_end, ended, forked_child, worker_child
from ds_cp.topology.job import Job

POLL_S = 0.1  # seconds between looks at the worker, where the kernel does not tell of its end
LOOK_S = 0.02  # seconds between looks at whether another worker is here
SIGNS = 4  # that a worker is asked for in the time in which it has to give one
GAP_S = 1.0  # seconds between looks at the worker, above which this process did not run


class Seat:
    """``outlives``: workers here outlive the loss of their peers, and can be replaced; ``on_word``
    is called in the event loop with what they say of that. A context manager, in the event loop:
    the worker ends with it, as ``worker_child`` says."""

    def __init__(self, config: Config, job: Job, outlives: bool) -> None:
        self.outlives = outlives
        self._spare_s = config.fault_tolerance.spare_after_s
        self.on_word: Callable[[Word], None] = lambda word: None
        self._config = config
        self._job = job
        self._stack = contextlib.ExitStack()
        self._child: Child | None = None
        self._spare: tuple[contextlib.ExitStack, Child] | None = None
        self._timer: asyncio.TimerHandle | None = None  # until there is a spare one
        self._serves = outlives and config.device != "cuda" and can_fork_servers()
        self._forks: Forks | None = None  # from which another worker is forked
        self._facts: Facts | None = None  # of the start
        self._kills = OomKills()
        self._is_left = False
        self._why = ""  # this process has ended the worker
        self._hears = False  # the worker can be asked for signs of life
        # In time.monotonic(): the last ``check``, the last ping, the first one without an answer.
        self._checked = 0.0
        self._asked: float | None = None
        self._unanswered: float | None = None

    def __enter__(self) -> Seat:
        returns = self._facts is not None
        self._stack, self._child = self._start(waits=returns)
        if returns:
            self._take(self._child)
        self._listen(self._child)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_left = True
        if self._timer is not None:
            self._timer.cancel()
        if self._spare is not None:
            stack, spare = self._spare
            spare.process.kill()
            stack.close()
        if self._forks is not None:
            self._forks.close()
        self._stack.close()

    def loaded(self, facts: Facts) -> None:
        """The job has started, with these facts: from now on the worker can be replaced, and after
        a while another one waits to take its place."""
        self._facts, self._hears = facts, True
        if self._forks is not None:
            self._forks.settle(facts)
        self._order_spare()

    def joins(self, facts: Facts) -> None:
        """Before the first worker is started: the job runs already, with these facts, and that one
        is to load alone."""
        self._facts = facts

    @property
    def facts(self) -> Facts | None:
        """Of the start, once the job has started."""
        return self._facts

    @property
    def can_replace(self) -> bool:
        """Whether another worker can take the place of this one."""
        return self.outlives and self._facts is not None

    @property
    def process(self) -> WorkerProcess:
        """The worker that is here now."""
        assert self._child is not None
        return self._child.process

    @property
    def channel(self) -> Channel:
        """For plans and results, of the worker that is here now."""
        assert self._child is not None
        return self._child.channel

    async def until_end(self, look: Callable[[], None]) -> float:
        """Wait for the end of the worker that is here now, and ``look`` now and then meanwhile.
        Returns when it was last seen alive, in ``time.monotonic()``."""
        process = self.process
        with ended(process.pid) as worker_ended:
            since = time.monotonic()
            while process.poll() is None:
                since = time.monotonic()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(worker_ended.wait(), POLL_S)
                look()
        return since

    def end(self, why: str) -> None:
        """Kill the worker, which ``why`` says: it "did not leave within 10 s"."""
        self._why = why
        self.process.kill()

    def check(self, hang_s: float) -> None:
        """To be called often: ask the worker, once it has loaded, for a sign of life, and end it
        when it gives none for ``hang_s`` seconds. The time in which this process did not run does
        not count."""
        now = time.monotonic()
        if not self._hears:
            return
        if now - self._checked > GAP_S:
            self._asked = self._unanswered = None
        self._checked = now
        if self._asked is None or now - self._asked >= hang_s / SIGNS:
            self.tell(Ping())
            self._asked = now
            self._unanswered = self._unanswered or now
        if self._unanswered is not None and now - self._unanswered >= hang_s:
            self.end(f"gave no sign of life for {hang_s:g} s")

    def cause(self, process: WorkerProcess) -> str:
        """How a worker of this rank, which has ended, did."""
        if self._why:
            return f"the worker of rank {self._job.rank} {self._why} and was ended"
        how = describe_end(process.returncode, self._kills.is_new())
        return f"the worker of rank {self._job.rank} was ended by {how}"

    async def each(
        self, work: Callable[[Channel], Awaitable[None]], end: asyncio.Task[None]
    ) -> None:
        """``work`` for the channel of each worker that is here, one after the other, up to ``end``.
        It returns when its worker has ended."""
        while not end.done():
            channel = self.channel
            await work(channel)
            while self.channel is channel and not end.done():
                await asyncio.sleep(LOOK_S)

    async def replace(self) -> None:
        """Start another worker, once this one has ended. Raises as ``worker_child``."""
        assert self.can_replace
        self._stack.close()
        if self._spare is not None and self._spare[1].process.poll() is not None:
            self._spare[0].close()  # it has died too
            self._spare = None
        self._why, self._hears, self._asked, self._unanswered = "", False, None, None
        place = await self._forked()
        if place is None:
            preloaded = self._spare is not None and self._preloads
            place, self._spare = self._spare or self._start(waits=True), None
            if not preloaded:
                self._take(place[1])
        self._stack, self._child = place
        self._listen(self._child)
        self._order_spare()

    async def _forked(self) -> tuple[contextlib.ExitStack, Child] | None:
        """A worker that the fork server has made, if there is one."""
        if self._forks is None or not self._forks.is_serving:
            return None
        stack = contextlib.ExitStack()
        making = forked_child(self._job, self._forks)
        try:
            child = await asyncio.to_thread(stack.enter_context, making)
        except EngineDeadError as err:
            say(f"warning: rank {self._job.rank} starts a new process: {err}")
            return None
        return stack, child

    @property
    def _preloads(self) -> bool:
        """Whether a spare worker loads its model before it is needed."""
        assert self._facts is not None
        return self._config.fault_tolerance.spare_model and self._facts.device == "cpu"

    def _take(self, child: Child) -> None:
        assert self._facts is not None
        with contextlib.suppress(EngineDeadError):  # its end is seen as any worker's
            child.take(self._facts)

    def tell(self, order: Order) -> None:
        """Give the worker an order; nothing happens when it has ended, which is seen elsewhere."""
        assert self._child is not None and self._child.orders is not None
        with contextlib.suppress(EngineDeadError):
            self._child.orders.send(order)

    def _start(self, waits: bool, spare: bool = False) -> tuple[contextlib.ExitStack, Child]:
        """A new process, which leaves a fork server behind unless it is a spare one."""
        stack = contextlib.ExitStack()
        forks = self._make_forks() if self._serves and not spare else None
        child = worker_child(self._config, self._job, self.outlives, waits, forks)
        return stack, stack.enter_context(child)

    def _make_forks(self) -> Forks:
        """For the server that the next process leaves behind."""
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._on_forks_end, forks)

        forks = Forks(on_end)
        if self._forks is not None:
            self._forks.close()
        self._forks = forks
        if self._facts is not None:
            forks.settle(self._facts)
        return forks

    def _on_forks_end(self, forks: Forks) -> None:
        if forks is self._forks and self._facts is not None and not self._is_left:
            self._order_spare()

    def _order_spare(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.outlives and self._spare_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._spare_s, self._make_spare)

    def _make_spare(self) -> None:
        try:
            assert self._spare is None
            if self._forks is not None and self._forks.is_open:
                return  # which waits already
            self._spare = self._start(waits=True, spare=True)
            if self._preloads:
                self._take(self._spare[1])
        except (DsCpError, OSError) as err:
            say(f"warning: no worker waits to take another one's place: {err}")

    def _listen(self, child: Child) -> None:
        """Hear what the worker says, in a thread that ends with it."""
        if child.orders is None:
            return
        loop, orders = asyncio.get_running_loop(), child.orders

        def hear() -> None:
            with contextlib.suppress(EngineDeadError, RuntimeError):  # it has ended, or the loop
                while True:
                    word = orders.receive(Word)
                    loop.call_soon_threadsafe(self._heard, child, word)

        threading.Thread(target=hear, name="ds_cp worker's words", daemon=True).start()

    def _heard(self, child: Child, word: Word) -> None:
        if child is not self._child:  # the last word of one that has died
            return
        if isinstance(word, Pong):
            self._unanswered = None
        else:
            self._hears = True
            self.on_word(word)
