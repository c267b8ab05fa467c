"""Random lives of requests on clusters with host memory: blocks go there and come back while
requests fork, are preempted, aborted and moved, and ranks are drained and opened again, and die.

As ``test_scheduler_lifecycles``, whose sessions these are: the simulated cluster checks the ledger,
host slots included, and every content that is read.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from ds_cp.scheduler.host_moves import HostRules
from tests.helpers.cluster import MODES, PLACEMENTS, prompt
from tests.unit.scheduler.test_scheduler_lifecycles import RATES, Session

KINDS = tuple(itertools.product(PLACEMENTS, MODES))
OFTEN = (
    *["ask"] * 12, *["step"] * 24, *["abort"] * 2, "end one", "spoil", "drain", *["reopen"] * 3,
    "level", "forget", *["die"] * 2, "poison", "away", *["back"] * 3,
)  # fmt: skip
LIVES_OF_A_KIND = 70
assert len(KINDS) * LIVES_OF_A_KIND >= 1_000
EVERYTHING = {"spill", "restore", "preempted", "aborted", "died"}


class HostSession(Session):
    """A session whose ranks have host memory: little of it, none, or more than the device."""

    def rules(self, ranks: int) -> HostRules | None:
        pick = self.pick
        slots = tuple((0, 2, 9, 40, 40, 40)[pick(0, 5)] for _ in range(ranks))
        rate = (1e5, 1e12, 1e12)[pick(0, 2)]
        cost = (None, None, replace(RATES, host_bytes_per_s=rate))[pick(0, 2)]
        return HostRules(slots, pick(1, 3), pick(1, 5), cost, 39)

    def _prompt(self, largest: int) -> list[int]:
        """A beginning that others have too, of more kinds than devices hold."""
        if self.pick(0, 3) == 0:
            return super()._prompt(largest)
        tokens = prompt(self.pick(max(largest // 2, 1), largest), self.pick(1, 3))
        if self.pick(0, 1):
            tokens[-1] = self.pick(0, 9)
        return tokens

    def happen(self, event: str) -> None:
        """The same, and forgetting all prefixes."""
        if event == "forget":
            self.cluster.scheduler.reset_prefix_cache()
        super().happen(event)


def live(seed: int, placement: str, mode: tuple[str, str]) -> tuple[int, Counter[str]]:
    """One session to its end; how many requests got there, and what happened."""
    rng = random.Random(seed)
    session = HostSession(rng.randint, placement, mode, rng.randint(1, 2))
    for _ in range(rng.randint(20, 150)):
        session.happen(rng.choice(OFTEN))
    ended, cluster = session.end(), session.cluster
    assert not any(cluster.tier.num_leased(rank) for rank in range(len(cluster.blocks)))
    return ended, session.seen + Counter(cluster.kinds)


@pytest.mark.parametrize(("placement", "mode"), KINDS)
def test_random_lives_with_host_memory(placement: str, mode: tuple[str, str]) -> None:
    """Other lives in every run; a failure names its seed, with which ``live`` repeats it."""
    ended = 0
    seen: Counter[str] = Counter()
    seeds = random.SystemRandom()
    while ended < LIVES_OF_A_KIND or EVERYTHING - {what for what, n in seen.items() if n}:
        assert ended < 20 * LIVES_OF_A_KIND, f"too tame: {seen}"
        seed = seeds.getrandbits(64)
        try:
            here, happened = live(seed, placement, mode)
        except Exception as err:
            raise AssertionError(f"live({seed}, {placement!r}, {mode}) failed") from err
        ended += here
        seen += happened
