"""What a step costs by mode and by number of ranks: floating point operations, bytes, exchanges.

Rates are achieved ones, measured at start (see "Context Parallelism for Scalable Million-Token
Inference", arXiv 2411.01783, section 3): with peak values the same formulas choose wrongly. Pure
numbers, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

WORTH = 0.7  # ratio of the predicted time to one rank's; above it a request stays on one rank
CLOSE = 1.05  # ratio of a predicted time to the least; up to it fewer ranks are as good


def attention_share(num_layers: int, num_q_heads: int, head_dim: int, weights: int) -> float:
    """Operations of a token's attention to one stored token over those of its linear layers."""
    return 4.0 * num_q_heads * head_dim * num_layers / (2.0 * max(weights, 1))


@dataclass(frozen=True)
class CostModel:
    """One rank and its links.

    ``flops_per_s``: achieved by one rank; ``bytes_per_s`` and ``latency_s``: of the slowest link
    class in use; ``weights``: parameters that every token passes; ``kv_bytes``: of one token in one
    layer; ``element``: bytes of one element.
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

    def prefill_s(self, ranks: int, new: int, past: int) -> float:
        """Seconds for ``new`` prompt tokens after ``past`` stored ones, spread over ``ranks``.

        Linear layers and attention divide by the ranks; of the ring's traffic what attention does
        not hide is added.
        """
        linear = 2.0 * self.weights * new
        pairs = new * (past + new / 2.0)
        attention = 4.0 * pairs * self.num_q_heads * self.head_dim * self.num_layers
        compute = (linear + attention) / ranks / self.flops_per_s
        if ranks == 1:
            return compute
        hidden = attention / ranks / self.flops_per_s
        sent = min(self._pass_kv_bytes(ranks, new + past), self._pass_q_bytes(ranks, new))
        traffic = self.num_layers * (sent / self.bytes_per_s + (ranks - 1) * self.latency_s)
        return compute + max(0.0, traffic - hidden) + self.num_layers * self.latency_s

    def decode_s(self, ranks: int, past: int) -> float:
        """Seconds that attention adds to one decode step of a request over ``ranks``: reading its
        KV, and by tree two exchanges a layer (queries out, partials back)."""
        attention = 4.0 * past * self.num_q_heads * self.head_dim * self.num_layers
        exchanges = 2 * self.num_layers * self.latency_s if ranks > 1 else 0.0
        return attention / ranks / self.flops_per_s + exchanges

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
        """Whether passing KV around hides under attention: T >= N C G e / (2 H BW)."""
        return new >= self.tokens_that_hide_kv(ranks)

    def tokens_that_hide_kv(self, ranks: int) -> float:
        """The least number of new tokens under which pass-KV is hidden, whatever is stored."""
        heads = self.num_kv_heads / (2.0 * self.num_q_heads)
        return ranks * self.flops_per_s * heads * self.element / self.bytes_per_s

    def _pass_kv_bytes(self, ranks: int, tokens: int) -> float:
        each = 2.0 * self.num_kv_heads * self.head_dim * self.element
        return (ranks - 1) / ranks * tokens * each

    def _pass_q_bytes(self, ranks: int, new: int) -> float:
        out = self.head_dim * self.element
        back = self.head_dim * self.element + 4
        return (ranks - 1) / ranks * new * self.num_q_heads * (out + back)
