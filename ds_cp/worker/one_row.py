"""One token chosen from one row of logits: the way of a CPU, where nothing has to be waited for and
what is left after a filter is small enough for the cache."""

from __future__ import annotations

import math

import torch

from ds_cp.plan import Sampled, Sampling
from ds_cp.worker.choose import COLDEST, HIGHEST, LEAST, Row, best_ids
from ds_cp.worker.scores import score_prompt


def sample_one(logits_V: torch.Tensor, row: Row) -> Sampled:
    """As ``sample_rows``, for one row of finite fp32 logits ``[V]``, any way of choosing."""
    how = row.how
    device = logits_V.device
    if how.logit_bias:
        ids = torch.tensor([t for t, _ in how.logit_bias], device=device)
        bias = torch.tensor([b for _, b in how.logit_bias], device=device)
        logits_V = logits_V.index_add(0, ids, bias)
    # vLLM's order: logit_bias, repetition, frequency, presence. A ban may stand anywhere in it, as
    # nothing brings a token back from -inf.
    scores_V = _penalized(logits_V, row) if how.penalizes else logits_V
    if row.bans:
        banned = torch.tensor(how.early_banned, device=device)
        scores_V = scores_V.index_fill(0, banned, -torch.inf)
    if how.temperature == 0.0:
        token = int(best_ids(scores_V[None]))
    else:
        token = _draw(scores_V / max(how.temperature, COLDEST), how, row.uniform)
    if token < 0 or how.logprobs < 0:
        return Sampled(row.request, token, 0.0)
    (score,) = score_prompt(logits_V[None], (token,), how.logprobs)
    return Sampled(row.request, token, score.logprob, score.top)


def _penalized(logits_V: torch.Tensor, row: Row) -> torch.Tensor:
    """Logits ``[V]`` with repetition_penalty on tokens of the prompt and the output, then
    frequency_penalty (per occurrence) and presence_penalty (once) on tokens of the output."""
    how = row.how
    assert row.history is not None, "penalties need the tokens so far"
    scores_V = logits_V.clone()
    output_ids, counts = row.history.output(logits_V.device)
    if how.repetition_penalty != 1.0:
        # an id that is in both is written twice, with the same score
        ids = torch.cat((row.history.prompt_ids(logits_V.device), output_ids))
        seen = logits_V[ids]
        penalty = max(how.repetition_penalty, LEAST)
        scores_V[ids] = torch.where(seen > 0, seen / penalty, seen * penalty).clamp(max=HIGHEST)
    if how.frequency_penalty != 0.0 or how.presence_penalty != 0.0:
        scores_V[output_ids] -= how.frequency_penalty * counts + how.presence_penalty
    return scores_V


def _draw(scores_V: torch.Tensor, how: Sampling, uniform: float) -> int:
    """A token after top_k, top_p and min_p in that order (as transformers; vLLM has min_p first):
    the inverse of the cumulative distribution, by id, at one ``uniform`` number in [0, 1).
    -1 when there is none.

    Tokens that drop out are left out, not set to 0: most often few remain to be sorted and summed.
    """
    if not math.isfinite(float(scores_V.max())):
        return -1
    V = scores_V.numel()
    ids: torch.Tensor | None = None  # of those that remain, ascending; None: all

    if 0 < how.top_k < V:
        floor = torch.topk(scores_V, how.top_k).values[-1]
        ids = torch.nonzero(scores_V >= floor)[:, 0]
        scores_V = scores_V[ids]
    probs = torch.softmax(scores_V, dim=-1)
    if how.top_p < 1.0:
        # All tokens below this weigh less than 1 - top_p together, so none of them is needed.
        kept = torch.nonzero(probs > (1.0 - how.top_p) / (2 * V))[:, 0]
        ordered, order = torch.sort(probs[kept], descending=True, stable=True)
        # Mass of better tokens: the first is always kept. In fp64, as ``draw`` has it.
        before = ordered.cumsum(0, dtype=torch.float64) - ordered
        kept = kept[order[before < max(how.top_p, LEAST)].sort().values]
        ids, probs = kept if ids is None else ids[kept], probs[kept]
    if how.min_p > 0.0:
        kept = torch.nonzero(probs >= how.min_p * probs.max())[:, 0]
        ids, probs = kept if ids is None else ids[kept], probs[kept]

    cumulative = probs.double().cumsum(0)
    total = float(cumulative[-1])
    # At most 1 - 2**-53, so the product is below total in fp64 and its place is that of a token.
    place = int(torch.searchsorted(cumulative, uniform * total, right=True))
    return place if ids is None else int(ids[place])
