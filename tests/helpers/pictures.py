"""Live pictures for tests of what shows them: a job of four ranks on two hosts."""

from __future__ import annotations

from contextlib import nullcontext

from ds_cp.engine.observer import Observer
from ds_cp.engine.picture import Picture
from tests.helpers.cluster import Cluster, greedy, prompt

HOSTS = ("alpha", "alpha", "beta", "beta")


class PicturedJob:
    """A simulated job: long requests span its ranks, short ones do not. ``mode`` as in the
    config."""

    def __init__(
        self, blocks: int = 12, mode: tuple[str, str] = ("auto", "auto"), budget: int = 8
    ) -> None:
        self.cluster = Cluster([blocks] * 4, 4, mode=mode, budget=budget, num_hosts=2)
        self._observer = Observer(self.cluster.core, HOSTS, nullcontext())
        self._sent = 0
        self._made = 0

    def add(self, length: int, answer: int = 6) -> str:
        """Another request; its id."""
        self._made += 1
        return self.cluster.add(prompt(length, self._made), greedy(answer)).request_id

    def step(self, steps: int = 1) -> None:
        """Some steps of the engine."""
        for _ in range(steps):
            self.cluster.step()
            self._sent += 4096

    def picture(self) -> Picture:
        """What there is to see now."""
        return self._observer.picture(0.5, {"tree": (self._sent, self._sent // 4096)})

    def mid_step(self) -> Picture:
        """What there is to see while the ranks work on the next step. The job ends with it."""
        self.cluster.core.plan()
        return self.picture()
