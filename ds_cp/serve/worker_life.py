"""The life of a worker process once it has loaded: it runs plans, and when a rank is gone, or a
step has failed on one, it leaves, waits, meets the others again, and goes on with its model and
KV."""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING

from ds_cp.config import Config
from ds_cp.errors import CommError, DsCpError, EngineDeadError, RankFailedError
from ds_cp.facts import Facts
from ds_cp.log_stream import drain_streams, say
from ds_cp.serve.channel import Channel, Interrupted, Result, Resumed
from ds_cp.serve.orders import MAX_CAUSE, Left, Met, Orders
from ds_cp.topology.job import Job
from ds_cp.topology.net import listening_address

if TYPE_CHECKING:
    from ds_cp.worker.worker import Worker


ENDS_S = 0.2  # seconds in which the end of a supervisor ends its worker


def end_deaf(rank: int) -> None:
    """This worker of ``rank`` does not hear its supervisor any more: it ends. If that one lives,
    another worker takes the place."""
    time.sleep(ENDS_S)
    say(f"warning: the worker of rank {rank} does not hear its supervisor any more and ends")
    end_at_once()


def end_at_once() -> None:
    """As if killed, so that another worker takes this one's place."""
    drain_streams()
    os.kill(os.getpid(), signal.SIGKILL)


class WorkerLife:
    """``orders``: None where the loss of a peer ends the process. ``facts``: of the start."""

    def __init__(
        self, channel: Channel, orders: Orders | None, job: Job, config: Config, facts: Facts,
        worker: Worker,
    ) -> None:  # fmt: skip
        self._channel = channel
        self._orders = orders
        self._job = job
        self._config = config
        self._facts = facts
        self._worker = worker
        self._generation = 0
        self._born: int | None = None

    def begin(self) -> None:
        """The worker has started together with all others."""
        self._born = 0
        self._close_doors()
        if self._orders is not None:
            self._orders.attend(0, self._worker.world.abandon)

    def run(self) -> None:
        """Run plans up to ``Stop``. Raises what ends the job. Whatever else goes wrong, such as a
        thread that the system does not give, ends this worker, and another one takes its place."""
        try:
            self._live()
        except DsCpError:
            raise
        except Exception:
            if self._orders is None:
                raise
            traceback.print_exc()
            end_at_once()

    def _live(self) -> None:
        while True:
            try:
                with self._worker.failing():  # the end of the channel too
                    self._serve()
                return
            except (CommError, RankFailedError) as err:
                if self._orders is None:
                    raise
                self._say_left(err)
            except EngineDeadError:
                if self._orders is None:
                    raise
                end_deaf(self._job.rank)
            self.meet()

    def _close_doors(self) -> None:
        """All peers have come: nobody else is to connect to this process, but to the store."""
        at = self._job.store_socket
        self._worker.world.close_listeners(
            None if at is None else listening_address(at.fileno())[1]
        )

    def _serve(self) -> None:
        if self._job.rank == 0:
            self._lead()
        else:
            self._worker.follow()

    def _lead(self) -> None:
        """Rank 0: give every plan that the supervisor sends to all ranks, up to ``Stop``; but not
        those that were made for another meeting of them."""
        worker, channel = self._worker, self._channel
        while True:
            if self._orders is not None:
                self._orders.wait_for(channel.sock)
            payload, generation = channel.receive_plan()
            if generation != self._generation:
                continue
            if (outcome := worker.forward(payload)) is None:
                return
            sent = {k: (e.bytes, e.exchanges) for k, e in worker.world.ledger.schemes().items()}
            channel.send(Result(outcome, sent))

    def _say_left(self, err: CommError | RankFailedError) -> None:
        assert self._orders is not None
        world, cause = self._worker.world, str(err)[:MAX_CAUSE]
        known = isinstance(err, RankFailedError)
        is_mine = known and not isinstance(err.__cause__, DsCpError)  # raised here, in a step
        if is_mine:
            traceback.print_exception(err.__cause__)
        # A call of a library that does not come back; a device that an error has made useless.
        if not world.has_left or (is_mine and world.device.type == "cuda"):
            end_at_once()
        if self._job.rank == 0:
            self._channel.send(Interrupted(self._generation, cause))
        self._orders.tell(Left(self._generation, cause, known))
        err.__traceback__ = None
        gc.collect()  # connections hang on what refers to itself: errors, their frames, groups

    def meet(self) -> None:
        """Wait to be called, and join the others. Raises what ends the job."""
        from ds_cp.startup.meet import meet_again

        orders = self._orders
        assert orders is not None
        while True:
            meeting = orders.next_meeting()
            generation = meeting.generation
            born = generation if self._born is None else self._born
            try:
                if orders.is_off(generation):
                    raise CommError("a rank is gone again")
                meet_again(
                    self._job, self._config, self._worker, self._facts, generation, born,
                    partial(orders.is_off, generation), meeting.away,
                )  # fmt: skip
            except (CommError, RankFailedError) as err:
                known = isinstance(err, RankFailedError)
                orders.tell(Left(generation, str(err)[:MAX_CAUSE], known))
                continue
            self._generation, self._born = generation, born
            self._close_doors()
            world = self._worker.world
            orders.attend(generation, world.abandon)
            orders.tell(Met(generation))
            if self._job.rank == 0:
                self._channel.send(Resumed(generation, world.born, meeting.away))
            return
