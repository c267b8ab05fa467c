"""From logits to a token, on the owner of the last token only."""

from __future__ import annotations

import torch

from ds_cp.engine.plan import Sampled, Sampling


def sample(request: int, logits_V: torch.Tensor, how: Sampling) -> Sampled:
    """Choose the next token from ``logits_V`` ``[V]``.

    Greedy at temperature 0 (the lowest id of equals). Otherwise temperature, then top_k, top_p and
    min_p in that order, as vLLM and transformers apply them. The random number depends on the
    request's seed and the token's index alone. Non-finite logits give token -1.
    """
    logits = logits_V.float()
    if how.logit_bias:
        ids = torch.tensor([t for t, _ in how.logit_bias], device=logits.device)
        bias = torch.tensor([b for _, b in how.logit_bias], device=logits.device)
        logits = logits.index_add(0, ids, bias)
    if not bool(torch.isfinite(logits.max())) or bool(torch.isnan(logits).any()):
        return Sampled(request, -1, 0.0)
    allowed = logits
    if how.banned:
        allowed = logits.index_fill(0, torch.tensor(how.banned, device=logits.device), -torch.inf)
    if how.temperature == 0.0:
        token = int(allowed.argmax())
    else:
        token = _draw(_filtered(allowed / how.temperature, how), how)
    if how.logprobs < 0:
        return Sampled(request, token, 0.0)
    logprobs = torch.log_softmax(logits, dim=-1)
    best = torch.topk(logprobs, how.logprobs) if how.logprobs else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return Sampled(request, token, float(logprobs[token]), top)


def _filtered(scores_V: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Probabilities ``[V]`` after top_k, top_p and min_p."""
    if 0 < how.top_k < scores_V.numel():
        floor = torch.topk(scores_V, how.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < floor, -torch.inf)
    probs = torch.softmax(scores_V, dim=-1)
    if how.top_p < 1.0:
        ordered, order = torch.sort(probs, descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # mass of better tokens: the first is always kept
        probs = probs.index_fill(0, order[before >= how.top_p], 0.0)
    if how.min_p > 0.0:
        probs = probs.masked_fill(probs < how.min_p * probs.max(), 0.0)
    return probs / probs.sum()


def _draw(probs_V: torch.Tensor, how: Sampling) -> int:
    """Inverse of the cumulative distribution at one uniform number named by (seed, index)."""
    uniform = (_mix(_mix(how.seed) + how.index) >> 11) / 2**53
    cumulative = probs_V.double().cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    last = int(torch.nonzero(probs_V)[-1])
    return min(index, last)


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014): 64 bits of which each depends on every bit of ``x``.
    torch's CPU generator would look at the low 32 bits of a seed only."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
