"""What a step costs by mode and by number of ranks: floating point operations, bytes, exchanges.

Rates are achieved ones, measured at start (see "Context Parallelism for Scalable Million-Token
Inference", arXiv 2411.01783, section 3): with peak values the same formulas choose wrongly. Pure
numbers, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Passing = Literal["local", "kv", "q", "tree"]  # what travels: nothing, in a ring, or by tree

WORTH = 0.7  # ratio of the predicted time to one rank's; above it a request stays on one rank
CLOSE = 1.05  # ratio of a predicted time to the least; up to it fewer ranks are as good


@dataclass(frozen=True)
class LayerWindows:
    """How far back the layers see: ``windows`` are (window W, number of layers that have it); the
    others of ``num_layers`` see every key up to the query's."""

    num_layers: int = 1
    windows: tuple[tuple[int, int], ...] = ()

    def pairs(self, q_runs: Sequence[tuple[int, int]]) -> float:
        """(query, key) pairs that queries at the positions of ``q_runs`` see, keys up to each
        there: the mean over the layers."""
        return self.mean(lambda window: sum(_pairs(start, n, window) for start, n in q_runs))

    def seen(self, tokens: int) -> float:
        """Keys that the next query after ``tokens`` stored ones sees of these; the mean."""
        return self.mean(lambda window: tokens if window is None else min(tokens, window))

    def mean(self, of: Callable[[int | None], float]) -> float:
        """The mean over the layers of ``of(window)``."""
        whole = self.num_layers - sum(count for _, count in self.windows)
        if whole == self.num_layers:
            return of(None)
        found = sum(count * of(window) for window, count in self.windows)
        return (found + (whole * of(None) if whole else 0.0)) / self.num_layers


def _pairs(start: int, n: int, window: int | None) -> int:
    """The sum of min(p + 1, W) over the n positions p from ``start`` on."""
    rising = n if window is None else min(max(window - start, 0), n)
    ramp = rising * start + rising * (rising + 1) // 2
    return ramp + (n - rising) * (window or 0)


def attention_share(num_layers: int, num_q_heads: int, head_dim: int, weights: int) -> float:
    """Operations of a token's attention to one stored token over those of its linear layers."""
    return 4.0 * num_q_heads * head_dim * num_layers / (2.0 * max(weights, 1))


@dataclass(frozen=True)
class Sums:
    """What the ranks that share a layer's heads add up: ``per_layer`` vectors of ``width`` elements
    for each token, over ``ranks`` ranks, by a link of ``bytes_per_s`` and ``latency_s``."""

    ranks: int
    per_layer: int
    width: int
    bytes_per_s: float
    latency_s: float

    def layer_s(self, tokens: float, element: int) -> float:
        """Seconds of a layer: each sum is a reduce-scatter and an all-gather, which send
        (n - 1) / n of the vectors each (Thakur et al., "Optimization of Collective Communication
        Operations in MPICH", 2005, section 4.4)."""
        if self.ranks == 1:
            return 0.0
        sent = 2.0 * (self.ranks - 1) / self.ranks * tokens * self.width * element
        return self.per_layer * (sent / self.bytes_per_s + 2.0 * self.latency_s)


@dataclass(frozen=True)
class CostModel:
    """One rank and its links.

    ``flops_per_s``: achieved by one rank; ``bytes_per_s`` and ``latency_s``: of the slowest link
    class in use; ``weights``: parameters that every token passes; ``kv_bytes``: of one token in one
    layer; ``element``: bytes of one element; ``windows``: as in ``LayerWindows``;
    ``in_background``: whether bytes move while a rank computes. Through shared memory they do not:
    the thread that computes copies them, when it posts an exchange and while it waits for it.
    ``host_bytes_per_s``: of KV between a rank and its host memory, 0 where it has none.

    What follows costs nothing where it is left out. ``attention_flops_per_s``: achieved by
    attention (left out: ``flops_per_s``); ``memory_bytes_per_s``: at which a rank reads weights
    while ``readers`` ranks of its host read, ``alone_bytes_per_s``: while no other does (left out:
    the same; a GPU has memory of its own), ``kv_bytes_per_s``: at which attention of a few rows
    reads KV (left out: as weights); ``layer_s``: seconds of a layer that no work explains, such as
    launches; ``step_s``: the same of a call; ``hop_s``: of one hop of a ring in one layer;
    ``head``: parameters that only the last token of a call passes; ``stored``: parameters of all
    layers, with the experts that a token does not pass; ``near_latency_s``: of an exchange inside a
    host, where ``latency_s`` is of one between hosts of several ranks; ``sums``: of tensor
    parallelism.
    """

    flops_per_s: float
    bytes_per_s: float
    latency_s: float
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    weights: int
    element: int
    windows: tuple[tuple[int, int], ...] = ()
    in_background: bool = True
    host_bytes_per_s: float = 0.0
    attention_flops_per_s: float | None = None
    memory_bytes_per_s: float = float("inf")
    alone_bytes_per_s: float | None = None
    readers: int = 1
    kv_bytes_per_s: float | None = None
    layer_s: float = 0.0
    step_s: float = 0.0
    hop_s: float = 0.0
    head: int = 0
    stored: int = 0
    near_latency_s: float | None = None
    sums: Sums | None = None

    @property
    def layers(self) -> LayerWindows:
        """How far back the layers see."""
        return LayerWindows(self.num_layers, self.windows)

    def prefill_s(self, ranks: int, new: int, past: int) -> float:
        """Seconds for ``new`` prompt tokens after ``past`` stored ones, spread over ``ranks``, by
        the faster ring."""
        kinds: tuple[Passing, ...] = ("local",) if ranks == 1 else ("kv", "q")
        return min(self.forward_s(kind, ranks, new, past) for kind in kinds)

    def decode_s(self, ranks: int, past: int) -> float:
        """Seconds of one decode step of a request over ``ranks`` that attention takes: reading its
        KV, and by tree two exchanges a layer (queries out, partials back). The rest of the step is
        the same on any number of ranks."""
        attention = self._attention_s(ranks, 1, past)
        if ranks == 1:
            return attention
        return attention + self._exchanges_s("tree", ranks, 1, past, attention)

    def host_s(self, tokens: int) -> float:
        """Seconds in which one rank copies the KV of ``tokens`` to its host memory, or back."""
        each = 2.0 * self.num_kv_heads * self.head_dim * self.element * self.num_layers
        return tokens * each / self.host_bytes_per_s if self.host_bytes_per_s else float("inf")

    def copy_pays(self, new: int, past: int, times: int) -> bool:
        """Whether ``times`` copies of the KV of ``new`` tokens take less than computing them anew
        after ``past`` stored ones, on one rank."""
        return times * self.host_s(new) < self.prefill_s(1, new, past)

    def forward_s(self, passing: Passing, ranks: int, new: int, past: int) -> float:
        """Seconds of one forward call: ``new`` tokens of one request after ``past`` stored ones,
        tokens and keys spread evenly over ``ranks``; a decode step is one new token.

        The sum of linear layers, attention, what travels and is not hidden, and what is fixed. A
        part that computes takes the longer of its operations and its reading ("Roofline", Williams
        et al., CACM 2009); linear layers near where both are equal take longer than either. Every
        rank at work reads all weights, however few tokens it has. M for ``reading_per_s``, M_kv for
        ``kv_bytes_per_s``, and t = max(T / N, 1):

            linear     hypot(2 W t / C, min(W t, stored) e / M), and the head for one token
            attention  max(4 pairs H D / C_a, 2 seen G D e / M_kv) L / N
            sums       of tensor parallelism, see ``Sums``
            exchanges  see ``_exchanges_s``
            fixed      layer_s L + step_s
        """
        alone = passing == "local" or ranks == 1
        over = 1 if alone else ranks
        attention = self._attention_s(over, new, past)
        exchanges = 0.0 if alone else self._exchanges_s(passing, ranks, new, past, attention)
        tokens = max(new / over, 1.0)
        sums = self.sums.layer_s(tokens, self.element) if self.sums else 0.0
        fixed = self.num_layers * (sums + self.layer_s) + self.step_s
        return self._linear_s(over, tokens) + attention + exchanges + fixed

    def chunks_s(self, passing: Passing, ranks: int, new: int, past: int, chunk: int) -> float:
        """Seconds of ``new`` prompt tokens in calls of at most ``chunk`` tokens."""
        return sum(
            self.forward_s(passing, ranks, min(chunk, new - at), past + at)
            for at in range(0, new, chunk)
        )

    def reading_per_s(self, ranks: int) -> float:
        """Bytes of memory a second that each of ``ranks`` reads: the ranks of a host share what all
        ``readers`` read together, and one alone has its own limit."""
        if self.alone_bytes_per_s is None:
            return self.memory_bytes_per_s
        shared = self.memory_bytes_per_s * self.readers / min(ranks, self.readers)
        return max(min(self.alone_bytes_per_s, shared), self.memory_bytes_per_s)

    def _linear_s(self, ranks: int, tokens: float) -> float:
        """On each of ``ranks``, which has ``tokens`` tokens."""
        reading = self.reading_per_s(ranks)
        read = min(self.weights * tokens, max(self.stored, self.weights)) * self.element
        body = math.hypot(2.0 * self.weights * tokens / self.flops_per_s, read / reading)
        operations, nbytes = 2.0 * self.head, self.head * self.element
        return body + max(operations / self.flops_per_s, nbytes / self.reading_per_s(1))

    def _attention_s(self, ranks: int, new: int, past: int) -> float:
        """Of all layers, on one of ``ranks``."""
        pairs = self.layers.pairs(((past, new),))
        seen = self.layers.mean(lambda w: min(past + new, w + new) if w else past + new)
        operations = 4.0 * pairs * self.num_q_heads * self.head_dim
        nbytes = 2.0 * seen * self.num_kv_heads * self.head_dim * self.element
        rate = self.attention_flops_per_s or self.flops_per_s
        reading = self.kv_bytes_per_s or self.reading_per_s(ranks)
        return self.num_layers * max(operations / rate, nbytes / reading) / ranks

    def _exchanges_s(
        self, passing: Passing, ranks: int, new: int, past: int, attention: float
    ) -> float:
        """Seconds of all layers in which a rank waits for the wire, or folds what came from it.

        kv    2 S G D e (N-1)/N bytes in N-1 hops, hidden under attention
        q     T H D e (N-1)/N in N-1 hops, hidden; then T H (D e + 4) (N-1)/N back, which are not
        tree  the same bytes in 1 exchange each, 2 each over several hosts; the queries are hidden
              under attention of a rank's own queries over its own keys, 1/N of all

        What is hidden, where bytes move in the background and every rank has queries of its own;
        arXiv 2411.01783 counts the same, tables 3 and 5. Each hop reads and writes the running
        partials, 8 H D bytes of fp32 a row, and takes ``hop_s``.
        """
        layers = self.num_layers
        hops = self.layers.mean(lambda window: 1.0 if window else ranks - 1.0)
        back = (
            self._pass_q_bytes(ranks, new)
            / self.bytes_per_s
            * ((self.head_dim * self.element + 4) / (2 * self.head_dim * self.element + 4))
        )
        out = self._pass_q_bytes(ranks, new) / self.bytes_per_s - back
        if passing == "kv":
            travel = self._pass_kv_bytes(ranks, new + past) / self.bytes_per_s
            travel, exposed, hides = travel + hops * self.latency_s, 0.0, 1.0
        elif passing == "q":
            travel, exposed = out + hops * self.latency_s, back + self.latency_s
            hides = 1.0
        else:
            once = self.latency_s + (self.near_latency_s or 0.0)
            travel, exposed, hides, hops = out + once, back + once, 1.0 / ranks, 0.0
        hidden = hides * attention if self.in_background and new >= ranks else 0.0
        folded = (ranks - 1) / ranks * new * self.num_q_heads * self.head_dim * 8.0
        fixed = hops * self.hop_s + folded / self.reading_per_s(ranks)
        return max(0.0, layers * travel - hidden) + layers * (exposed + fixed)

    def best_ranks(self, most: int, new: int, past: int, answer: int) -> int:
        """The number of ranks, at most ``most``, that serves a lone request fastest: ``new`` prompt
        tokens to compute after ``past`` found ones, then ``answer`` tokens one by one. The smallest
        number within ``CLOSE`` of the fastest; 1 unless that is below ``WORTH`` of one rank's time.
        """
        times = [
            self.prefill_s(ranks, new, past) + answer * self.decode_s(ranks, past + new)
            for ranks in range(1, max(most, 1) + 1)
        ]
        least = min(times)
        if least >= WORTH * times[0]:
            return 1
        return next(ranks for ranks, t in enumerate(times, 1) if t <= CLOSE * least)

    def kv_hides(self, ranks: int, new: int) -> bool:
        """Whether passing KV around hides under attention: T >= N C G e / (2 H BW), where bytes
        move in the background at all."""
        return self.in_background and new >= self.tokens_that_hide_kv(ranks)

    def tokens_that_hide_kv(self, ranks: int) -> float:
        """The least number of new tokens under which pass-KV is hidden, whatever is stored."""
        heads = self.num_kv_heads / (2.0 * self.num_q_heads)
        return ranks * self.flops_per_s * heads * self.element / self.bytes_per_s

    def pass_q_pays(self, ranks: int, new: int, past: int, share: float) -> bool:
        """Whether passing queries to where keys are costs less than passing keys to where queries
        are, when one of the ranks holds ``share`` of the keys (1 / ranks: all hold as much). Who
        holds more attends more queries than its own, while the others wait."""
        pairs = self.layers.pairs(((past, new),))
        lag = 4.0 * pairs * self.num_q_heads * self.head_dim * (share - 1 / ranks)
        uneven = share * ranks  # the largest shard sets the pace of every hop
        kv = self._pass_kv_bytes(ranks, new + past) * uneven
        q = self._pass_q_bytes(ranks, new)
        return q / self.bytes_per_s + lag / self.flops_per_s <= kv / self.bytes_per_s

    def _pass_kv_bytes(self, ranks: int, tokens: int) -> float:
        """Of one rank in one layer, the mean. A windowed layer sends what the two stretches of
        queries of a zigzag share see, at most."""
        each = 2.0 * self.num_kv_heads * self.head_dim * self.element
        around = (ranks - 1) / ranks * tokens
        return each * self.layers.mean(
            lambda window: min(around, 2.0 * window) if window else around
        )

    def _pass_q_bytes(self, ranks: int, new: int) -> float:
        out = self.head_dim * self.element
        back = self.head_dim * self.element + 4
        return (ranks - 1) / ranks * new * self.num_q_heads * (out + back)
