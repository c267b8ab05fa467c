"""Ranks meet again after one has died: the part of each supervisor in it.

Every supervisor replaces its worker and carries out what is asked of that one; rank 0's decides
(``generations``), and hears all of them.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

from ds_cp.config import Config
from ds_cp.log_stream import say
from ds_cp.serve.generations import Action, Generations, GiveUp, Kill
from ds_cp.serve.job_link import Asked, Died, End, FollowingLink, LeadingLink, Said, link_name
from ds_cp.serve.orders import Left, Loaded, Met, Word
from ds_cp.serve.seat import Seat
from ds_cp.topology.job import Job

if TYPE_CHECKING:
    from ds_cp.serve.worker_link import ProcessLink

LOAD_S = 300.0  # seconds that a new worker may load, or comm.timeout_s where that is more
TICK_S = 0.25  # seconds between looks at what is overdue
GRACE_S = 5.0  # seconds for a worker to end by itself after rank 0's supervisor has


def can_mend(config: Config, job: Job) -> bool:
    """Whether the ranks of this job can go on after a worker has died: there is one supervisor, or
    they have a link, and no worker holds a shard that needs its peers to be loaded."""
    return (
        config.fault_tolerance.max_restarts > 0
        and config.tensor_parallel.tp_size == 1
        and (job.world_size == 1 or link_name(job) is not None)
    )


class Supervisor(Protocol):
    """What this part asks of the whole."""

    @property
    def mends(self) -> bool:
        """Whether a worker that dies now is replaced, and one that has left is called again."""
        ...

    def end_worker(self) -> None:
        """Kill the worker, whose end the job's is."""
        ...

    def give_up(self, why: str) -> None:
        """End the job."""
        ...


class Mending:
    """``link``: to the others. All runs in the event loop."""

    def __init__(
        self,
        config: Config,
        job: Job,
        seat: Seat,
        link: LeadingLink | FollowingLink,
        supervisor: Supervisor,
    ) -> None:
        self._job = job
        self._seat = seat
        self._link = link
        self._supervisor = supervisor
        self.worker: ProcessLink | None = None  # as rank 0's engine reaches it
        self._is_out = False  # the worker is in no group, and waits for a meeting
        seat.on_word = self._on_word
        if isinstance(link, LeadingLink):
            link.on_said = self._on_said
        else:
            link.on_asked, link.on_bye = self._on_asked, self._on_bye
        self._generations = Generations(
            job.world_size,
            config.fault_tolerance.max_restarts,
            max(LOAD_S, config.comm.timeout_s),
        )
        self._hang_s = config.fault_tolerance.hang_s
        self._began = 0.0  # the interruption, in time.monotonic()
        self._ticking: asyncio.Task[None] | None = None

    @property
    def is_possible(self) -> bool:
        """Whether the job has started, and its supervisors hear each other."""
        heard = self._job.world_size == 1 or self._link.is_open
        return self._seat.can_replace and heard

    @property
    def is_mending(self) -> bool:
        """On rank 0: whether ranks have yet to meet again."""
        return not self._generations.is_whole

    def died(self, cause: str) -> None:
        """The worker of this rank has ended by no wish of anyone. Another one is started, unless
        the job is given up. Raises as ``Seat.replace``."""
        self._is_out = False
        self._hear(Died(cause))  # first, so that the others leave meanwhile
        if not self._supervisor.mends:
            return
        self._seat.replace()
        if self.worker is not None:
            self.worker.replace(self._seat.channel)

    def look(self) -> None:
        """From time to time: whether the worker of this rank lives."""
        if self._hang_s is not None and self._supervisor.mends:
            self._seat.check(self._hang_s)

    def end_if_out(self) -> None:
        """The job ends: no meeting follows for which a worker might wait."""
        if self._is_out and self._seat.process.poll() is None:
            self._supervisor.end_worker()

    def _on_word(self, word: Word) -> None:
        """The worker of this rank says something."""
        self._is_out = isinstance(word, Left)
        if self._job.rank == 0 or self._supervisor.mends:
            self._hear(word)
        else:
            self.end_if_out()

    def _on_bye(self) -> None:
        """Rank 0's supervisor has ended the job, and the workers with it."""
        if self._is_out:
            self.end_if_out()
        else:
            asyncio.get_running_loop().call_later(GRACE_S, self._end_late)

    def _end_late(self) -> None:
        if self._seat.process.poll() is None:
            self._supervisor.end_worker()

    def _hear(self, said: Said) -> None:
        if isinstance(self._link, FollowingLink):
            self._link.say(said)
        else:
            self._on_said(0, said)

    def _on_asked(self, asked: Asked) -> None:
        """Rank 0 asks something of this rank's worker."""
        if isinstance(asked, End):
            self._seat.end(asked.why)
        else:
            self._seat.tell(asked)

    # --- on rank 0

    def _on_said(self, rank: int, said: Said) -> None:
        """Something has happened to the worker of a rank."""
        if not self._supervisor.mends:
            if isinstance(said, Died | Left):
                self._supervisor.give_up(said.cause)
                self.end_if_out()
            return
        found, now = self._generations, time.monotonic()
        was_whole = found.is_whole
        steps = self.worker.steps_done if self.worker is not None else 0
        if isinstance(said, Died):
            say(f"warning: {said.cause}; another worker takes its place, requests go on")
            actions = found.died(rank, said.cause, steps, now)
        elif isinstance(said, Left):
            if was_whole and said.known:
                say(f"warning: {said.cause}; the ranks meet again, requests go on")
            actions = found.left(rank, said.generation, said.cause, steps, now)
        elif isinstance(said, Loaded):
            actions = found.loaded(rank, now)
        else:
            assert isinstance(said, Met)
            actions = found.met(rank, said.generation, now)
        if was_whole and not found.is_whole:
            self._began = now
        self._carry_out(actions)
        if found.is_whole and not was_whole:
            seconds = time.monotonic() - self._began
            say(f"all ranks have met again (generation {found.generation}, {seconds:.1f} s)")
        elif not found.is_whole and self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, GiveUp):
                self._supervisor.give_up(action.why)
                return
            asked: Asked = End(action.why) if isinstance(action, Kill) else action.order
            if action.rank == 0:
                self._on_asked(asked)
            else:
                assert isinstance(self._link, LeadingLink)
                self._link.ask(action.rank, asked)

    async def _tick(self) -> None:
        while not self._generations.is_whole:
            await asyncio.sleep(TICK_S)
            self._carry_out(self._generations.overdue(time.monotonic()))
        self._ticking = None
