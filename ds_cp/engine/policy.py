"""Which mode a request's step runs in. The plain rule this project began with; a calibrated
prediction can take its place behind the same two questions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModePolicy:
    """``mode`` and ``ring_pass`` as in the config ("auto" leaves the choice to the rule).

    ``local_threshold``: prompts longer than this span although they would fit on one rank (None: no
    such limit). ``num_hosts``, ``num_q_heads``, ``num_kv_heads``: what the rule looks at.
    """

    mode: str
    ring_pass: str
    local_threshold: int | None
    num_hosts: int
    num_q_heads: int
    num_kv_heads: int

    def may_be_local(self, prompt_tokens: int) -> bool:
        """Whether a request of this length should stay on one rank if one has room for it."""
        if self.mode != "auto":
            return self.mode == "local"
        return self.local_threshold is None or prompt_tokens <= self.local_threshold

    def choose(self, ranks: int, new: int, past: int) -> tuple[str, str]:
        """(mode, ring_pass) of an item with ``new`` tokens over ``past`` stored ones on ``ranks``
        ranks.

        auto: local on one rank; spanning decode by tree; spanning prefill by ring, or by tree when
        more than two ranks on several hosts take part.
        """
        mode = self.mode
        if mode == "auto":
            if ranks == 1:
                mode = "local"
            elif new == 1 or (ranks > 2 and self.num_hosts > 1):
                mode = "tree"
            else:
                mode = "ring"
        return mode, self._pass(new, past) if mode == "ring" else "kv"

    def _pass(self, new: int, past: int) -> str:
        """auto: the smaller message (arXiv 2411.01783, equation 1); a first prefill moves KV, which
        hides under the attention as the partials of queries do not."""
        if self.ring_pass != "auto":
            return self.ring_pass
        if past == 0:
            return "kv"
        return "q" if new * self.num_q_heads <= 2 * self.num_kv_heads * (new + past) else "kv"
