"""The process that a launcher starts on every rank: it owns the worker and outlives its launcher.

Rank 0's supervisor also runs the HTTP application and the engine. A stop that is asked for, by a
signal to any rank or by the end of the launcher, becomes rank 0's: it drains its requests and sends
the stop plan to all workers; the other supervisors wait for their worker to end and kill it when it
does not. A failure on any rank becomes rank 0's too, which names it first, also during a drain.

What decides how this process ends is set before a word is written.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

from ds_cp.config import Config
from ds_cp.errors import DsCpError, EngineDeadError
from ds_cp.log_stream import say
from ds_cp.process import StopSignals, settle_heap
from ds_cp.serve.announce import Announce, print_ready
from ds_cp.serve.channel import Channel, Failed, FromWorker, Ready
from ds_cp.serve.detached import WorkerProcess
from ds_cp.serve.job_link import FollowingLink, LeadingLink
from ds_cp.serve.job_words import ORPHAN_S, Gone, Lost
from ds_cp.serve.meeting_place import MeetingPlace
from ds_cp.serve.mending import Mending, can_mend
from ds_cp.serve.preparations import Front, load_tokenizer, note_launchers, open_front, watch_files
from ds_cp.serve.seat import Seat
from ds_cp.serve.worker_child import SIGNALS, noticed, until_end
from ds_cp.topology.job import Job
from ds_cp.topology.launcher_process import launcher_processes
from ds_cp.trace.writing import STALLED_S, Writing

if TYPE_CHECKING:
    from ds_cp.serve.async_engine import AsyncEngine

LEAVE_S = 2.0  # seconds for workers to end after the stop plan
POLL_S = 0.1  # seconds between looks at the worker and the launcher
TOLD_S = 1.0  # seconds for the errors of a failed engine to reach their clients
CAUSE_S = 1.5  # seconds that rank 0 waits for the cause when its worker knows only of a lost peer
# Seconds that another rank whose worker reported a failure waits for rank 0, which says the cause:
# launchers end the job at the first exit.
HEAD_START_S = 3.0
# Seconds for the report of a worker that has ended to be read: rank 0's engine may still be loading
# the tokenizer, other ranks wait for nothing else.
FIRST_WORD_S, LAST_WORD_S = 30.0, 1.0
FOLLOW_S = 5.0  # seconds that other ranks wait beyond the drain, which began on rank 0


def serve(config: Config, job: Job, announce: Announce = print_ready) -> int:
    """Serve until a signal or a failure ends the job; the exit code. Rank 0 calls ``announce`` once
    requests are served. Raises ``LaunchError``, ``ModelError`` before a process is started."""
    return asyncio.run(_Supervisor(config, job, announce).run())


class _Supervisor:
    def __init__(self, config: Config, job: Job, announce: Announce = print_ready) -> None:
        self._announce = announce
        self._config = config
        self._job = job
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()  # end now rather than drain
        self._asked = 0.0  # when the stop was asked for, in time.monotonic()
        self._loaded = False  # the worker can run plans
        self._reported = False  # the cause of a failure is known here, or to rank 0
        self._failed = False
        self._leaving = False  # the workers were told to end, or are killed
        self._signals = StopSignals()
        self._pending: tuple[str, int] | None = None  # a failure whose cause may still come
        self._exit_code = 0
        # A rank other than 0 waits at most for an exchange until rank 0 takes what it recorded.
        stalled_s = config.comm.timeout_s + STALLED_S
        self._leave_s = LEAVE_S + (0.0 if config.trace.file is None else stalled_s)
        self._trace = Writing(config.trace.file if job.rank == 0 else None, stalled_s)
        self._launchers = launcher_processes(job.launcher)
        self._engine: AsyncEngine | None = None
        self._leading = LeadingLink(job.world_size, self._on_lost, self._on_gone, self._on_stopping)
        self._following = FollowingLink(job.rank, config.comm.timeout_s, self._on_gone)
        link = self._link = self._leading if job.rank == 0 else self._following
        self._place = MeetingPlace(config, job, link, self._fail, lambda: self._loaded)
        self._seat = Seat(config, self._place.worker_job, can_mend(config, job))
        self._mending = Mending(config, job, self._seat, self._link, self)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        leads = self._job.rank == 0
        found = open_front(self._config) if leads else None
        files = watch_files(self._config, self._job)  # as they are before the worker reads them
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        await self._place.open(self._launchers[0].identity if self._launchers else "")
        self._loaded = await self._mending.joins(self._stop)
        with self._seat:
            watch = asyncio.create_task(self._watch())
            watch.add_done_callback(self._on_watched)
            if files is not None:
                files.start()
            try:
                if found is not None:
                    await self._serve_http(found)
                else:
                    await self._seat.each(self._follow, watch)
                if not (self._failed and leads):
                    await until_end(watch, self._leave_s, self._trace.goes_on)
            finally:
                watch.cancel()
                await self._link.close()
                self._place.close()
        return self._exit_code

    # --- rank 0: the HTTP application

    async def _serve_http(self, front: Front) -> None:
        from ds_cp.api.app import create_app
        from ds_cp.api.transport.listen import urls
        from ds_cp.api.transport.server import serve_until
        from ds_cp.serve.journaled_engine import JournaledEngine
        from ds_cp.serve.worker_link import ProcessLink, WorkerFailedError, WorkerLostError

        source, listeners, journal = front
        server = self._config.server
        loop = asyncio.get_running_loop()
        addresses = urls(listeners)

        def on_ready(ready: Ready) -> None:
            self._loaded = True
            loop.call_soon_threadsafe(self._seat.loaded, ready.facts)
            settle_heap()
            note_launchers(self._job, self._launchers)
            self._announce(ready.summary, addresses)

        def on_death(err: DsCpError, exit_code: int) -> None:
            lost = isinstance(err, WorkerLostError)  # _watch reports the exit code
            known = not isinstance(err, WorkerFailedError) or err.cause_known
            loop.call_soon_threadsafe(self._on_death, str(err), exit_code, known, lost)

        self._mending.worker = worker = ProcessLink(self._seat.channel, self._seat.outlives)
        self._engine = engine = JournaledEngine(
            journal, self._config, source.name, worker, loop, partial(load_tokenizer, source),
            on_ready, on_death, is_mending=lambda: self._mending.is_mending,
        )  # fmt: skip
        self._place.on_strangers = partial(setattr, engine, "num_strangers")
        engine.start()
        app = create_app(engine, server, log_requests=True, journal=journal)
        await serve_until(app, listeners, server, self._stop, self._hurry)
        end = time.monotonic() + CAUSE_S
        while self._pending is not None and not self._may_fail and time.monotonic() < end:
            await asyncio.sleep(POLL_S)
        self._leaving = True
        await engine.stop(LEAVE_S if self._loaded and not self._failed else 0.0)

    # --- other ranks

    async def _follow(self, channel: Channel) -> None:
        """Wait until the worker ends: after rank 0's stop plan, or by a failure, which rank 0
        reports."""
        try:
            message = await asyncio.to_thread(channel.receive, FromWorker)
            if isinstance(message, Ready):
                self._loaded = True
                self._seat.loaded(message.facts)
                message = await asyncio.to_thread(channel.receive, FromWorker)
            if isinstance(message, Failed):
                self._reported = True
                known = message.cause_known  # else, during a drain, rank 0 may have left
                if not self._may_fail and (known or not self._stop.is_set()):
                    self._exit_code = message.exit_code
                    # While they load, the ranks agree on what rank 0 is to say.
                    if known and self._loaded:
                        await self._following.report(
                            Lost(message.named(self._job), message.exit_code)
                        )
                    await self._following.until_end(HEAD_START_S)
        except EngineDeadError:
            pass  # the worker has ended; _watch reports the exit code

    # --- a stop that is asked for

    def _on_signal(self, number: int) -> None:
        self._signals.take(number)
        # mpirun kills a quarter of a second after its SIGTERM.
        hurry = number == signal.SIGINT or self._signals.count > 1 or self._job.launcher == "mpi"
        self._begin_stop(signal.Signals(number).name, hurry)

    def _on_stopping(self, rank: int, reason: str, hurry: bool) -> None:
        self._begin_stop(f"{reason} on rank {rank}", hurry)

    def _begin_stop(self, reason: str, hurry: bool) -> None:
        """Stop the job; ``hurry`` tells the clients at once. A launcher that has seen a rank fail
        asks for it too: then the failure is what ends the job."""
        if self._pending is not None:
            self._fail(*self._pending)
        first, hurried = not self._stop.is_set(), self._hurry.is_set()
        if first:
            self._asked = time.monotonic()
            if not self._signals.count:  # the same may come as a signal too
                self._signals.take(signal.SIGTERM)
        self._stop.set()
        if self._engine is not None:
            self._engine.refuse_new()
            if hurry:
                self._engine.cut()
        if hurry:
            self._hurry.set()
        if self._failed or not (first or (hurry and not hurried)):
            return
        self._following.stopping(reason, hurry)
        if self._job.rank == 0:
            left = self._config.server.drain_timeout_s
            what = "are told" if hurry else f"get up to {left:g} s"
            say(f"{reason}: stopping; requests in flight {what}")

    # --- failures

    @property
    def _may_fail(self) -> bool:
        """Whether the job ends by now however its workers do: a failure is known, nothing was
        loaded, the clients were told, or the workers were."""
        known = self._failed or self._hurry.is_set()
        return self._stop.is_set() and (known or self._leaving or not self._loaded)

    def _on_death(self, message: str, exit_code: int, cause_known: bool, lost: bool) -> None:
        """The engine has ended, and its requests know it. A lost peer is reported by its cause if
        that comes in time, and a ``lost`` worker by how it ended."""
        if self._may_fail:
            return
        self._reported = self._reported or not lost
        if not lost and (cause_known or not self._leading.is_open):
            self._fail(message, exit_code)
        else:
            self._pending = (message, exit_code)
            loop = asyncio.get_running_loop()
            loop.call_later(CAUSE_S, self._fail, message, exit_code)

    def _on_lost(self, rank: int, lost: Lost) -> None:
        """Another rank's supervisor says that its worker has ended."""
        if not self._mending.goes_on_without(rank, cause := noticed(lost.cause, lost.since)):
            self._fail(cause, lost.exit_code)

    def _on_gone(self, rank: int, gone: Gone) -> None:
        """Another rank's supervisor is gone. ds-cp as launcher says so, but not once it was
        signalled; of rank 0's, one rank of a host does."""
        first = self._job.rank <= 1 or self._job.local_rank == 0
        says = first and (self._job.launcher != "ds-cp" or self._stop.is_set())
        self._leave_s = min(self._leave_s, ORPHAN_S if rank == 0 else math.inf)
        cause = gone.describe(rank, self._config.fault_tolerance)
        if not self._mending.gone(rank, cause):
            self._fail(cause, 1, says)

    def _fail(self, message: str, exit_code: int, says: bool = True) -> None:
        if self._may_fail:
            return
        if self._stop.is_set():
            message += ", during the drain"
        self._failed = self._reported = True
        self._exit_code = exit_code
        self._asked = time.monotonic()
        if self._engine is not None:
            self._engine.fail(message)
        self._mending.end_if_out()
        self._stop.set()
        # Requests of the engine know by now; what is still on its way does not hold up the end.
        asyncio.get_running_loop().call_later(TOLD_S, self._hurry.set)
        if says:
            say(f"error: {message}")

    # --- a worker that dies is replaced

    @property
    def mends(self) -> bool:
        """Whether a worker that dies now is replaced."""
        ends = self._failed or self._reported or self._leaving or self._hurry.is_set()
        return self._mending.is_possible and self._loaded and not ends

    def give_up(self, why: str) -> None:
        """As ``Mending`` wants it."""
        self._fail(why, 1)

    def end_worker(self) -> None:
        """The worker waits for a meeting that will not be."""
        self._leaving = self._reported = True
        self._exit_code = self._exit_code or int(not self._stop.is_set())
        self._seat.process.kill()

    async def _watch(self) -> None:
        """See each worker's end, and replace those that die while they are wanted."""
        while True:
            process = self._seat.process
            since = await self._seat.until_end(self._look)
            if process.returncode >= 0 or not self.mends:
                break
            await self._mending.died(noticed(self._seat.cause(process), since))
        await self._report_end(process, since)

    # --- what this process watches

    def _look(self) -> None:
        """Stop when the launcher has ended, and kill a worker that outlives its time."""
        self._mending.look()
        for launcher in [one for one in self._launchers if not one.is_alive]:
            self._launchers.remove(launcher)
            self._begin_stop(f"the launcher {launcher} has ended", hurry=False)
        if self._stop.is_set() and time.monotonic() - self._asked >= self._patience_s():
            self._leaving = True
            self._seat.process.kill()

    async def _report_end(self, process: WorkerProcess, since: float) -> None:
        """The worker has ended, and so does the job."""
        if process.returncode > 0:  # it left by itself, and has said why unless it crashed
            await self._hear(FIRST_WORD_S if self._job.rank == 0 else LAST_WORD_S)
        if self._may_fail or self._reported:
            return
        if process.returncode == 0 and self._job.rank != 0:
            return  # after the stop plan
        cause = self._seat.cause(process)
        if self._job.rank == 0:
            self._fail(noticed(cause, since), 1)
            return
        self._exit_code, self._reported = 1, True
        if not await self._following.report(Lost(cause, since=since)):
            self._fail(noticed(cause, since), 1)

    async def _hear(self, seconds: float) -> None:
        """Wait for the worker's report, or for the end of what it sent, at most ``seconds``."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self._may_fail or self._reported or self._pending is not None:
                return
            await asyncio.sleep(0.02)

    def _on_watched(self, watch: asyncio.Task[None]) -> None:
        """A watch that has failed is a fault of ours, which must not leave the server behind."""
        if not watch.cancelled() and (err := watch.exception()) is not None:
            self._fail(f"{type(err).__name__}: {err} (this is a fault of ds_cp)", 1)

    def _patience_s(self) -> float:
        """Seconds after the stop until the worker is killed: 0 while it loads, since nothing runs
        that could be drained; no limit on rank 0, where the engine ends it."""
        if not self._loaded:
            return 0.0
        if self._job.rank == 0:
            return math.inf
        drains = not (self._hurry.is_set() or self._failed)
        return self._leave_s + (self._config.server.drain_timeout_s + FOLLOW_S if drains else 0.0)
