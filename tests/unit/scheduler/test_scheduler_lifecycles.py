"""Ten thousand random lives of requests on simulated clusters, checked in every step.

Requests of all kinds come, share prefixes, fork, are preempted, aborted and end, while ranks are
drained, opened again, made level, and die, with the steps in flight done in part.
``tests.helpers.cluster`` checks the ledger, the budgets, the turns, and all that is read and fed;
at the end nothing may be left, and every request that was not aborted must have got the tokens that
it gets alone.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ds_cp.cost import CostModel
from ds_cp.errors import CapacityError, QueueFullError
from ds_cp.layout import LAYOUTS
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.host_moves import HostRules
from ds_cp.scheduler.mode_policy import Seats
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.request import Request
from tests.helpers.cluster import (
    EOS,
    MODES,
    PLACEMENTS,
    Cluster,
    in_every_step,
    in_its_decodes,
    in_its_last_chunk,
    prompt,
)

KINDS = tuple(itertools.product(PLACEMENTS, MODES, (1, 2)))
LIVES_OF_A_KIND = 400
assert len(KINDS) * LIVES_OF_A_KIND >= 10_000

RATES = CostModel(
    flops_per_s=1e9, bytes_per_s=1e9, latency_s=1e-6, num_layers=2, num_q_heads=4, num_kv_heads=2,
    head_dim=8, weights=1000, element=4,
)  # fmt: skip
LONGEST = 39  # tokens of one request, so that a life is short whatever the pools
EVENTS = (
    *["ask"] * 6, *["step"] * 12, *["abort"] * 2, "end one", "spoil", "drain", "reopen", "level",
    "die", "poison", "away", *["back"] * 3,
)  # fmt: skip


STRIKES = (in_every_step, in_its_last_chunk, in_its_decodes)


class Session:
    """A cluster, and what happens to it. ``pick(low, high)``: any number from low to high."""

    def __init__(
        self, pick: Callable[[int, int], int], placement: str, mode: tuple[str, str], depth: int
    ) -> None:
        self.pick = pick
        most = (5, 9, 9, 30)[pick(0, 3)]
        blocks = [pick(0, most) for _ in range(pick(1, 4))]
        blocks[-1] = max(blocks[-1], 1)
        self.cluster = Cluster(
            blocks, pick(1, 5), placement=placement, mode=mode, depth=depth,
            layout=LAYOUTS[pick(0, 1)],
            local_threshold=(None, None, 0, 3, 20)[pick(0, 4)],
            max_model_len=(10_000, LONGEST)[pick(0, 1)],
            max_num_seqs=pick(1, 7),
            budget=(2, 3, 5, 8, 12, 1000)[pick(0, 5)],
            max_queue=(3, 100)[pick(0, 1)],
            num_hosts=pick(1, 2),
            eos_every=(0, 6, 20)[pick(0, 2)],
            cost=(None, RATES)[pick(0, 1)],
            pacer=(None, ChunkPacer(2.0))[pick(0, 1)],
            seats=(None, Seats(tuple("abab"[: len(blocks)]), pick(1, 2)))[pick(0, 1)],
            prefix_caching=pick(0, 5) > 0,
            host=self.rules(len(blocks)),
        )  # fmt: skip
        self.cluster.seconds = lambda plan: pick(0, 100) / 1000
        self.seen: Counter[str] = Counter()

    def rules(self, ranks: int) -> HostRules | None:
        """What host memory each rank has: none."""
        return None

    def happen(self, event: str) -> None:
        """One of EVENTS, as far as it is possible now."""
        cluster, scheduler, pick = self.cluster, self.cluster.scheduler, self.pick
        live = [
            life.request for life in cluster.lives.values() if life.reason is None
            and not life.aborted
        ]  # fmt: skip
        rank = pick(0, len(cluster.blocks) - 1)
        if event == "step":
            cluster.step()
        elif event == "ask":
            self.ask()
        elif event == "abort" and live:
            assert cluster.abort(live[pick(0, len(live) - 1)])
            self.seen["aborted"] += 1
        elif event == "end one" and live:
            cluster.abort_answer(live[pick(0, len(live) - 1)])
        elif event == "spoil" and live:
            self.spoil(live[pick(0, len(live) - 1)])
        elif event == "drain":
            self.drain(rank)
        elif event == "reopen":
            scheduler.reopen(rank)
        elif event == "level":
            self.seen["moves wished for"] += scheduler.rebalance()
        elif event == "die":
            self.die()
        elif event in ("away", "back"):
            self.meet(event == "back")
        elif event == "poison" and live and pick(0, 9) == 0:
            cluster.strikes = STRIKES[pick(0, 2)]
            cluster.poison.add(live[pick(0, len(live) - 1)].number)
        scheduler.check_integrity()

    def ask(self) -> None:
        cluster, pick = self.cluster, self.pick
        largest = min(cluster.scheduler.largest_tokens, LONGEST - 1)
        if not largest:
            return
        tokens = self._prompt(largest)
        room = largest - len(tokens) + 1
        max_tokens = min(room, (1, 2, 3, 8, room, pick(1, room))[pick(0, 5)])
        more: dict[str, object] = {}
        if pick(0, 5) == 0:
            more["min_tokens"] = pick(0, max_tokens)
        if pick(0, 5) == 0:
            more["stop_token_ids"] = tuple(range(pick(0, 9), EOS, 9))
        if pick(0, 9) == 0:
            more["ignore_eos"] = True
        if pick(0, 5) == 0:
            more["presence_penalty"] = 0.5
        if pick(0, 9) == 0:
            more["prompt_logprobs"] = 0
        if pick(0, 3) == 0:
            more["n"] = pick(1, min(4, cluster.scheduler.limits.max_num_seqs))
        params = SamplingParams(
            max_tokens=max_tokens, temperature=float(pick(0, 1)), seed=pick(0, 3), **more
        )  # type: ignore[arg-type]
        try:
            asked = cluster.ask(
                tokens,
                params,
                priority=(0, 0, 0, 1, -1)[pick(0, 4)],
                salt="a" * (pick(0, 4) == 0),
                client=("", "", "a", "b")[pick(0, 3)],
            )
        except QueueFullError:
            assert len(cluster.scheduler.waiting) >= cluster.scheduler.limits.max_queue
        else:
            self.seen["asked"] += len(asked)

    def _prompt(self, largest: int) -> list[int]:
        """A beginning that others have too, perhaps an end of its own; or a chat's next turn."""
        pick, lives = self.pick, self.cluster.lives
        if lives and pick(0, 3) == 0:
            last = lives[pick(1, len(lives))].request
            tokens = [*last.prompt, *last.output, pick(0, 9)]
            if len(tokens) <= largest:
                return tokens
        tokens = prompt(pick(1, min(largest, (largest, 12)[pick(0, 1)])), pick(1, 2))
        if pick(0, 2) == 0:
            tokens[-1] = pick(0, 9)
        return tokens

    def spoil(self, request: Request) -> None:
        """Bad logits, a few draws on."""
        drawn = len(self.cluster.lives[request.number].tokens) - len(request.prompt)
        self.cluster.not_finite(request, drawn + self.pick(0, 2))

    def die(self) -> None:
        """Some ranks lose their workers, or none when just an exchange failed; all meet again."""
        cluster, pick = self.cluster, self.pick
        records = cluster.scheduler._inquest._records.values()
        if any(record.times > 1 or record.alone for record in records):
            return  # once more would look like the fault of who runs
        ranks = range(len(cluster.blocks))
        lost = [rank for rank in ranks if pick(0, len(cluster.blocks)) == 0]
        self.seen["died"] += bool(lost and cluster.scheduler.running)
        self.seen["died with steps in flight"] += bool(lost and cluster.flying)
        cluster.die(lost, lambda: bool(pick(0, 1)))

    def meet(self, back: bool) -> None:
        """A rank other than 0 goes away, or comes back, by a new worker or by the one that it
        had."""
        cluster, pick = self.cluster, self.pick
        ranks = [r for r in range(1, len(cluster.blocks)) if (r in cluster.away) == back]
        if not ranks:
            return
        rank = ranks[pick(0, len(ranks) - 1)]
        lost = [rank] if not back or pick(0, 1) else []
        if pick(0, 3) == 0:
            lost.append(pick(0, len(cluster.blocks) - 1))  # another one dies meanwhile
        self.seen["back" if back else "away"] += 1
        cluster.die(lost, lambda: bool(pick(0, 1)), cluster.away ^ {rank})

    def drain(self, rank: int) -> None:
        scheduler = self.cluster.scheduler
        closed = set(scheduler.block_manager.closed)
        try:
            scheduler.drain(rank)
        except CapacityError as err:
            assert scheduler.block_manager.closed == closed and err.need > err.largest
            left = [n for r, n in enumerate(self.cluster.blocks) if r not in closed | {rank}]
            local = self.cluster.mode[0] == "local"
            most = max(left, default=0) if local else sum(left)
            assert err.largest == most * self.cluster.block_size
        else:
            assert scheduler.block_manager.closed == closed | {rank}
            self.seen["drained"] += 1

    def end(self) -> int:
        """Run all to its end; how many requests got there."""
        cluster = self.cluster
        closed = set(cluster.scheduler.block_manager.closed)
        plans = cluster.settle()
        for rank in closed:
            assert cluster.scheduler.is_drained(rank) and not cluster.cached()[rank]
        self.seen["preempted"] += cluster.scheduler.num_preemptions
        self.seen["refused"] += cluster.refused
        self.seen["moved"] += cluster.scheduler.migration.num_moved
        self.seen["hits"] += cluster.scheduler.block_manager.hits
        self.seen["forked"] += sum(len(plan.forks) for plan in plans)
        for life in cluster.lives.values():
            self.seen[str(life.reason)] += 1
            guilty = life.reason == "error" and life.request.number in cluster.poison
            self.seen["ended by its poison"] += guilty
        return cluster.check_outputs()


def live(seed: int, placement: str, mode: tuple[str, str], depth: int) -> tuple[int, Counter[str]]:
    """One session to its end; how many requests got there, and what happened."""
    rng = random.Random(seed)
    session = Session(rng.randint, placement, mode, depth)
    for _ in range(rng.randint(5, 60)):
        session.happen(rng.choice(EVENTS))
    return session.end(), session.seen


@pytest.mark.parametrize(("placement", "mode", "depth"), KINDS)
def test_random_lives(placement: str, mode: tuple[str, str], depth: int) -> None:
    """Other lives in every run; a failure names its seed, with which ``live`` repeats it."""
    ended = 0
    seen: Counter[str] = Counter()
    seeds = random.SystemRandom()
    while ended < LIVES_OF_A_KIND:
        seed = seeds.getrandbits(64)
        try:
            here, happened = live(seed, placement, mode, depth)
        except Exception as err:
            raise AssertionError(f"live({seed}, {placement!r}, {mode}, {depth}) failed") from err
        ended += here
        seen += happened
    everything = {"asked", "aborted", "drained", "preempted", "moved", "hits", "forked",
                  "length", "stop", "error", "died", "away", "back"}  # fmt: skip
    assert everything <= {what for what, count in seen.items() if count}, f"too tame: {seen}"


class Lives(RuleBasedStateMachine):
    """The same, with hypothesis to choose, and to find the shortest way to a failure."""

    @initialize(
        data=st.data(),
        placement=st.sampled_from(PLACEMENTS),
        mode=st.sampled_from(MODES),
        depth=st.sampled_from([1, 2]),
    )
    def start(self, data: st.DataObject, placement: str, mode: tuple[str, str], depth: int) -> None:
        self.session = Session(
            lambda low, high: data.draw(st.integers(low, high)), placement, mode, depth
        )
        self.session.cluster.seconds = lambda plan: 0.01

    def _do(self, data: st.DataObject, event: str) -> None:
        self.session.pick = lambda low, high: data.draw(st.integers(low, high))
        self.session.happen(event)

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self._do(data, "ask")

    @precondition(lambda self: self.session.cluster.scheduler.has_work)
    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.session.cluster.step()

    @precondition(lambda self: self.session.cluster.scheduler.has_work)
    @rule(data=st.data(), event=st.sampled_from(["abort", "end one", "spoil"]))
    def part(self, data: st.DataObject, event: str) -> None:
        self._do(data, event)

    @rule(
        data=st.data(), event=st.sampled_from(["drain", "reopen", "level", "die", "away", "back"])
    )
    def rearrange(self, data: st.DataObject, event: str) -> None:
        self._do(data, event)

    @invariant()
    def ledger_balances(self) -> None:
        if hasattr(self, "session"):
            self.session.cluster.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.end()


Lives.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase
