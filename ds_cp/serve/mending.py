"""Ranks meet again after one has died: the part of each supervisor in it.

Every supervisor replaces its worker and carries out what is asked of that one; rank 0's decides
(``generations``), and hears all of them. One that is started again, while the job goes on without
it, asks rank 0's first, and has its worker load alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ds_cp.config import Config
from ds_cp.facts import Facts
from ds_cp.log_stream import say
from ds_cp.serve.generations import Action, Generations, GiveUp, Kill
from ds_cp.serve.job_link import FollowingLink, LeadingLink, has_link
from ds_cp.serve.job_words import Asked, Died, End, Gone, Hello, Running, Said, Starting, Unwanted
from ds_cp.serve.orders import Leave, Left, Loaded, Met, Word
from ds_cp.serve.seat import Seat
from ds_cp.topology.hosts import rank_text
from ds_cp.topology.job import Job
from ds_cp.version import __version__

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
        and (job.world_size == 1 or has_link(job))
    )


def mark_of(config: Config) -> str:
    """What the supervisors of a job have in common."""
    what = f"{__version__} {config.model_dump_json(exclude={'server'})}"
    return hashlib.sha256(what.encode()).hexdigest()


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
        self._is_away = False  # rank 0 cannot be reached
        self._generation = 0  # that the worker of this rank is in
        seat.on_word = self._on_word
        if isinstance(link, LeadingLink):
            link.on_said, link.on_here = self._on_said, self._on_here
        else:
            link.on_asked, link.on_bye = self._on_asked, self._on_bye
            link.on_away, link.on_back = self._on_away, self._on_back
        self._generations = Generations(
            job.world_size,
            config.fault_tolerance.max_restarts,
            max(LOAD_S, config.comm.timeout_s),
            config.fault_tolerance.min_ranks,
        )
        self._limits = config.fault_tolerance
        self._min_ranks = config.fault_tolerance.min_ranks
        self._mark = mark_of(config)
        self._patience_s = config.comm.timeout_s
        if isinstance(link, FollowingLink) and self._min_ranks is not None:
            link.mark = self._mark
        self._standing: asyncio.Future[Facts | None] | None = None  # see ``joins``
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

    async def died(self, cause: str) -> None:
        """The worker of this rank has ended by no wish of anyone. Another one is started, unless
        the job is given up. Raises as ``Seat.replace``."""
        self._is_out = False
        self._hear(Died(cause))  # first, so that the others leave meanwhile
        if not self._supervisor.mends:
            return
        await self._seat.replace()
        if self.worker is not None:
            self.worker.replace(self._seat.channel)

    async def joins(self, stop: asyncio.Event) -> bool:
        """Before the first worker is started: whether the job runs already, without this rank, so
        that its worker is to load alone. Asks rank 0's supervisor, unless the others do not go on
        without a rank; up to ``stop``."""
        if self._min_ranks is None or isinstance(self._link, LeadingLink):
            return False
        if not has_link(self._job):
            return False
        self._standing = asyncio.get_running_loop().create_future()
        stopped = asyncio.create_task(stop.wait())
        first = asyncio.FIRST_COMPLETED
        waits: set[asyncio.Future[Any]] = {self._standing, stopped}
        await asyncio.wait(waits, timeout=self._patience_s, return_when=first)
        stopped.cancel()
        facts = self._standing.result() if self._standing.done() else None
        if facts is not None:
            self._seat.joins(facts)
        return facts is not None

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
        if isinstance(word, Met):
            self._generation = word.generation
        if self._job.rank == 0 or self._supervisor.mends:
            self._hear(word)
        elif not self._is_away:
            self.end_if_out()

    def _on_away(self, gone: Gone) -> None:
        """Rank 0 cannot be reached: the worker leaves, and keeps what it has."""
        say(f"warning: {gone.describe(0, self._limits)}; this rank tries to reach it again")
        self._is_away = True
        self._seat.tell(Leave(self._generation))

    def _on_back(self) -> None:
        """Rank 0 is reached again, which then says how it has gone on."""
        self._is_away = False

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
        if isinstance(asked, Starting | Running):
            if self._standing is not None and not self._standing.done():
                self._standing.set_result(asked.facts if isinstance(asked, Running) else None)
            elif self._is_out:
                self._hear(Left(self._generation, "rank 0 was out of reach"))
        elif isinstance(asked, Unwanted):
            self._supervisor.give_up(asked.why)
            if self._standing is not None and not self._standing.done():
                self._standing.set_result(None)
        elif isinstance(asked, End):
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
        was_whole, steps = found.is_whole, self._steps
        if isinstance(said, Died):
            say(f"warning: {said.cause}; another worker takes its place, requests go on")
            facts = self._seat.facts
            is_slow = facts is not None and facts.device != "cpu"
            actions = found.died(rank, said.cause, steps, now, is_slow)
        elif isinstance(said, Left):
            if was_whole and said.known:
                say(f"warning: {said.cause}; the ranks meet again, requests go on")
            actions = found.left(rank, said.generation, said.cause, steps, now)
        elif isinstance(said, Loaded):
            actions = found.loaded(rank, now)
        else:
            assert isinstance(said, Met)
            actions = found.met(rank, said.generation, now)
        self._follow_up(actions, was_whole)

    @property
    def _steps(self) -> int:
        """That the ranks have done so far."""
        return self.worker.steps_done if self.worker is not None else 0

    def _follow_up(self, actions: list[Action], was_whole: bool) -> None:
        """After something was said to ``generations``."""
        found = self._generations
        was_met = found.is_whole and not was_whole
        if was_whole and not found.is_whole:
            self._began = time.monotonic()
        self._carry_out(actions)
        if was_met:
            seconds = time.monotonic() - self._began
            who = "all ranks" if not found.absent else self._present
            say(f"{who} have met again (generation {found.generation}, {seconds:.1f} s)")
        if not found.is_settled and self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())

    # --- ranks that go and come back

    def gone(self, rank: int, cause: str) -> bool:
        """The supervisor of ``rank`` is gone. Whether the job goes on without it, or is given up
        here."""
        if self._min_ranks is None or not self._supervisor.mends:
            return False
        if isinstance(self._link, FollowingLink):
            return False
        found, was_whole = self._generations, self._generations.is_whole
        was_absent = rank in found.absent
        actions = found.gone(rank, cause, self._steps, time.monotonic())
        if actions and isinstance(actions[0], GiveUp):
            least = self._min_ranks
            actions = [GiveUp(f"{actions[0].why}, and fault_tolerance.min_ranks is {least}")]
        elif not was_absent:
            say(f"warning: {cause}; the job goes on with {self._present}: {self._room}")
        self._follow_up(actions, was_whole)
        return True

    def goes_on_without(self, rank: int, cause: str) -> bool:
        """The supervisor of ``rank`` gives up. Whether the others go on without it already."""
        if rank not in self._generations.absent:
            return False
        say(f"warning: {cause}; the job goes on with {self._present}")
        return True

    def _on_here(self, hello: Hello) -> None:
        """The supervisor of a rank is here."""
        assert isinstance(self._link, LeadingLink)
        facts, found = self._seat.facts, self._generations
        if self._min_ranks is None:
            return  # nobody asks
        if facts is None:
            self._link.ask(hello.rank, Starting())
        elif hello.rank not in found.absent:
            self._link.ask(hello.rank, Unwanted(f"rank {hello.rank} is a part of the job already"))
        elif not hello.host and hello.mark != self._mark:
            self._link.ask(hello.rank, Unwanted(
                f"the job goes on without rank {hello.rank}, but with another config or version of "
                "ds_cp: start it with the same file, options and version"
            ))  # fmt: skip
        else:
            say(f"rank {hello.rank} is here again, and loads")
            self._link.ask(hello.rank, Running(replace(facts, notes=())))
            self._follow_up(found.back(hello.rank, time.monotonic()), found.is_whole)

    @property
    def _present(self) -> str:
        """How many ranks are here, and which are not."""
        absent, size = self._generations.absent, self._job.world_size
        who = f"rank{'s' * (len(absent) > 1)} {rank_text(absent)}"
        return f"{size - len(absent)} of {size} ranks, without {who}"

    @property
    def _room(self) -> str:
        """For KV, on the ranks that are here."""
        facts, absent = self._seat.facts, self._generations.absent
        assert facts is not None
        counts = enumerate(facts.blocks_per_rank)
        here = sum(blocks for rank, blocks in counts if rank not in absent)
        room, full = (n * facts.block_size for n in (here, sum(facts.blocks_per_rank)))
        return f"KV for {room} tokens rather than {full}"

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
        while not self._generations.is_settled:
            await asyncio.sleep(TICK_S)
            self._carry_out(self._generations.overdue(time.monotonic()))
        self._ticking = None
