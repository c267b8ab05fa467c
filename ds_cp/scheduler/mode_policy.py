"""Which mode a request's step runs in, and over how many ranks a prompt is spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_cp.cost import CostModel, LayerWindows
from ds_cp.scheduler.reasons import Choice, ModeReason, SpanReason, Width

TILT = 1.25  # ratio of the largest share of the keys to the mean; up to it queries may travel


@dataclass(frozen=True)
class Seats:
    """``host_of[rank]``: the host of each rank. ``at_once``: how many ranks of one host have cores
    to compute at the same time. Where a host has more ranks than that, short requests keep
    together: each rank at work reads all weights for its step, and would wait for a core.
    """

    host_of: tuple[str, ...]
    at_once: int

    @property
    def at_work(self) -> int:
        """How many ranks of all hosts can compute at the same time."""
        hosts = set(self.host_of)
        return sum(min(self.at_once, self.host_of.count(host)) for host in hosts)

    def asleep(self, load: Sequence[int]) -> set[int]:
        """Ranks without work, on hosts where ``at_once`` ranks or more are at work."""
        working: dict[str, int] = {}
        for host, work in zip(self.host_of, load, strict=True):
            working[host] = working.get(host, 0) + (work > 0)
        return {
            rank
            for rank, host in enumerate(self.host_of)
            if not load[rank] and working[host] >= self.at_once
        }


@dataclass(frozen=True)
class ModePolicy:
    """``mode`` and ``ring_pass`` as in the config ("auto" leaves the choice to the rules).

    ``local_threshold``: prompts longer than this span although they would fit on one rank (None:
    the cost model says). ``num_hosts``, ``num_q_heads``, ``num_kv_heads``: what the rules look at.
    ``cost``: measured rates; without it a request spans only when it has to. ``windows``: how far
    back the layers see, by which the work of a prompt is dealt out.
    """

    mode: str
    ring_pass: str
    local_threshold: int | None
    num_hosts: int
    num_q_heads: int
    num_kv_heads: int
    cost: CostModel | None = None
    windows: LayerWindows = LayerWindows()

    def may_be_local(self, prompt_tokens: int) -> bool:
        """Whether a request of this length may stay on one rank if one has room for it."""
        if self.mode != "auto":
            return self.mode == "local"
        return self.local_threshold is None or prompt_tokens <= self.local_threshold

    def width(
        self, most: int, new: int, past: int, answer: int, busy: bool, at_work: int | None = None
    ) -> Width:
        """Over how many of ``most`` ranks a prompt should be spread, if that many have room.

        All when it may not be local. Otherwise one while other requests, which can use the other
        ranks, run or wait; alone, as many as the cost model says make it faster, of the ``at_work``
        that can compute at the same time (None: all). ``answer``: its output tokens.
        """
        if self.mode == "local":
            return Width(1, SpanReason.LOCAL_SET)
        if not self.may_be_local(new + past):
            return Width(most, SpanReason.LONG if self.mode == "auto" else SpanReason.SPAN_SET)
        if self.local_threshold is not None:
            return Width(1, SpanReason.SHORT)
        if busy:
            return Width(1, SpanReason.BUSY)
        if self.cost is None:
            return Width(1, SpanReason.NO_RATES)
        ranks = self.cost.best_ranks(min(most, at_work or most), new, past, answer)
        return Width(ranks, SpanReason.MORE_PAYS if ranks > 1 else SpanReason.ONE_PAYS)

    def gathers(self, ranks: int, tokens: int) -> bool:
        """Whether a request that decodes with ``tokens`` tokens over ``ranks`` ranks is faster on
        one, if one has room for it: exchanges cost more than dividing its attention saves."""
        if self.mode != "auto" or ranks < 2 or not self.may_be_local(tokens):
            return False
        return self.cost is None or self.cost.decode_s(1, tokens) <= self.cost.decode_s(
            ranks, tokens
        )

    def decide(self, ranks: int, new: int, past: int, share: float | None = None) -> Choice:
        """The mode of a step with ``new`` tokens over ``past`` stored ones on ``ranks``
        ranks, of which one holds ``share`` of the keys (None: all hold as much).

        auto: local on one rank; spanning decode by tree; spanning prefill by ring, or by tree when
        more than two ranks on several hosts take part. Where queries travel, by tree or ring
        pass-Q, they are attended where the keys are: auto lets them only if the ranks hold about as
        many keys each, or if that is seen to cost less.
        """
        level = self._level(ranks, new, past, share)
        if self.mode in ("local", "tree"):
            return Choice(self.mode, "kv", ModeReason.SET)
        if self.mode == "auto":
            if ranks == 1:
                return Choice("local", "kv", ModeReason.ONE_RANK)
            if new == 1:
                return Choice("tree", "kv", ModeReason.ONE_QUERY)
            if ranks > 2 and self.num_hosts > 1 and level:
                return Choice("tree", "kv", ModeReason.HOSTS)
        return Choice("ring", *self._pass(ranks, new, past, level))

    def _level(self, ranks: int, new: int, past: int, share: float | None) -> bool:
        if share is None or share * ranks <= TILT:
            return True
        return self.cost is not None and self.cost.pass_q_pays(ranks, new, past, share)

    def _pass(self, ranks: int, new: int, past: int, level: bool) -> tuple[str, ModeReason]:
        """auto: arXiv 2411.01783, algorithm 1: KV travels if that hides under the attention or is
        the smaller message, else queries. A first chunk moves KV; without rates the message sizes
        alone decide. The algorithm takes the keys to be ``level``."""
        if self.ring_pass != "auto":
            return self.ring_pass, ModeReason.PASS_SET
        if past == 0:
            return "kv", ModeReason.FIRST
        if not level:
            return "kv", ModeReason.UNEVEN
        if self.cost is not None and self.cost.kv_hides(ranks, new):
            return "kv", ModeReason.HIDES
        if new * self.num_q_heads <= 2 * self.num_kv_heads * (new + past):
            return "q", ModeReason.Q_SMALLER
        return "kv", ModeReason.KV_SMALLER
