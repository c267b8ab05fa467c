"""From logits to tokens and log-probabilities, on the owner of a row only."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ds_cp.plan import Sampled, Sampling

COLDEST = 1e-5  # least temperature: dividing by less would overflow
LEAST = 1e-30  # least top_p and repetition_penalty: less would be 0 in fp32
HIGHEST = 1e30  # largest score, so that it is finite in fp32 after division by COLDEST
BLOCK = 256  # ids among which the best is looked for at once
SCORE_ROWS = 64  # prompt rows whose log-probabilities are held in fp32 at a time


class History:
    """The tokens of one request as penalties count them, kept on the device from draw to draw: the
    distinct ids of the prompt, and of the output those with the number of times each came."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        self._prompt = prompt
        self._prompt_ids: torch.Tensor | None = None
        self._places: dict[int, int] = {}  # output id -> its place in the two tensors
        self._ids = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0)
        self._coming: list[int] = []  # output that the tensors do not have yet
        self.num_output = 0
        self.append(output)

    def append(self, tokens: Sequence[int]) -> None:
        """More output, in its order."""
        self._coming += tokens
        self.num_output += len(tokens)

    def prompt_ids(self, device: torch.device) -> torch.Tensor:
        """Distinct ids of the prompt, int64 ``[P]``."""
        if self._prompt_ids is None:
            ids: torch.Tensor = torch.unique(torch.tensor(self._prompt, dtype=torch.int64))
            self._prompt_ids = ids.to(device)
        return self._prompt_ids

    def output(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct ids of the output, int64 ``[O]``, and the count of each, fp32 ``[O]``."""
        coming, self._coming = self._coming, []
        self._ids, self._counts = self._ids.to(device), self._counts.to(device)
        places = [self._places.setdefault(token, len(self._places)) for token in coming]
        size = len(self._places)
        if size > self._ids.numel():  # room for twice as many
            room = torch.zeros(max(2 * size, 64) - self._ids.numel(), device=device)
            self._ids = torch.cat((self._ids, room.long()))
            self._counts = torch.cat((self._counts, room))
        if coming:
            at = torch.tensor(places, device=device)
            self._ids[at] = torch.tensor(coming, device=device)
            self._counts.index_add_(0, at, torch.ones(len(places), device=device))
        return self._ids[:size], self._counts[:size]


@dataclass(frozen=True, slots=True)
class Row:
    """One token to draw. ``index``: the number of output tokens before it. ``history``: the tokens
    so far, needed only when ``how.looks_back``."""

    request: int
    index: int
    how: Sampling
    history: History | None = None


class Score(NamedTuple):
    """Log-probability of one prompt token and the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def sample_rows(logits_RV: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Choose the next token of each row of ``logits_RV`` ``[R, V]``.

    A row's token depends on that row alone, and its random number on (seed, index) alone.
    Temperature 0 is greedy, the lowest id of equals. Log-probabilities are of the logits with
    ``logit_bias``, before penalties, bans and filters. A row gets token -1 when its logits are not
    finite, when nothing is allowed, or when drawing it raises (the traceback goes to stderr): it
    must not end the others. ``logits_RV`` is not changed. Raises ``ValueError`` when the numbers of
    rows differ.
    """
    if len(rows) != logits_RV.shape[0]:
        raise ValueError(f"{logits_RV.shape[0]} rows of logits for {len(rows)} tokens to draw")
    if not rows:
        return []
    tokens = _best(logits_RV)
    return [
        Sampled(row.request, token, 0.0) if token < 0 or _is_plain(row) else _guarded(logits_V, row)
        for row, token, logits_V in zip(rows, tokens, logits_RV, strict=True)
    ]


def score_prompt(logits_TV: torch.Tensor, tokens: Sequence[int], top: int) -> list[Score]:
    """Log-probabilities (natural log, in fp32) of ``tokens``, token t by row t of ``logits_TV``
    ``[T, V]``, each with the ``top`` most likely ids. NaN where a row is not finite. Raises
    ``ValueError`` when the numbers of tokens and rows differ."""
    if len(tokens) != logits_TV.shape[0]:
        raise ValueError(f"{logits_TV.shape[0]} rows of logits for {len(tokens)} prompt tokens")
    scores: list[Score] = []
    for start in range(0, len(tokens), SCORE_ROWS):
        logprobs_SV = torch.log_softmax(logits_TV[start : start + SCORE_ROWS].float(), dim=-1)
        ids = torch.tensor(tokens[start : start + SCORE_ROWS], device=logprobs_SV.device)
        own = logprobs_SV.gather(1, ids[:, None])[:, 0].tolist()
        best = torch.topk(logprobs_SV, min(top, logprobs_SV.shape[1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        scores += [
            Score(logprob, tuple(zip(top_ids, values, strict=True)))
            for logprob, (top_ids, values) in zip(own, pairs, strict=True)
        ]
    return scores


def _best(scores_RV: torch.Tensor) -> list[int]:
    """The best id of each row of ``[R, V]``, the lowest of equals; -1 where the best is not finite.

    A search by blocks: on a CPU, finding a maximum is many times faster than finding its place.
    """
    V = scores_RV.shape[1]
    width = min(BLOCK, V)
    whole = V - V % width
    peaks_RB = scores_RV[:, :whole].reshape(-1, whole // width, width).amax(dim=2)
    if whole < V:
        rest = scores_RV[:, whole:].amax(dim=1, keepdim=True)
        peaks_RB = torch.cat((peaks_RB, rest), dim=1)
    peak = peaks_RB.max(dim=1)  # the first of equals; NaN counts as higher than all numbers
    start = (peak.indices * width).clamp(max=V - width)
    block = start[:, None] + torch.arange(width, device=start.device)
    tokens = start + scores_RV.gather(1, block).max(dim=1).indices
    found: list[int] = tokens.masked_fill(~torch.isfinite(peak.values), -1).tolist()
    return found


def _guarded(logits_V: torch.Tensor, row: Row) -> Sampled:
    try:
        return _sample_one(logits_V.float(), row)
    except Exception:
        print(f"ds_cp: error: request {row.request} cannot be drawn from", file=sys.stderr)
        traceback.print_exc()
        return Sampled(row.request, -1, 0.0)


def _bans(row: Row) -> bool:
    return bool(row.how.early_banned) and row.index < row.how.min_tokens


def _is_plain(row: Row) -> bool:
    """Whether the best of the model's own logits is all that is wanted."""
    how = row.how
    return (
        how.temperature == 0.0
        and how.logprobs < 0
        and not how.logit_bias
        and not how.looks_back
        and not _bans(row)
    )


def _sample_one(logits_V: torch.Tensor, row: Row) -> Sampled:
    """As ``sample_rows``, for one row of finite fp32 logits ``[V]``, any way of choosing."""
    how = row.how
    device = logits_V.device
    if how.logit_bias:
        ids = torch.tensor([t for t, _ in how.logit_bias], device=device)
        bias = torch.tensor([b for _, b in how.logit_bias], device=device)
        logits_V = logits_V.index_add(0, ids, bias)
    # vLLM's order: logit_bias, repetition, frequency, presence. A ban may stand anywhere in it, as
    # nothing brings a token back from -inf.
    scores_V = _penalized(logits_V, row) if how.looks_back else logits_V
    if _bans(row):
        banned = torch.tensor(how.early_banned, device=device)
        scores_V = scores_V.index_fill(0, banned, -torch.inf)
    if how.temperature == 0.0:
        (token,) = _best(scores_V[None])
    else:
        token = _draw(scores_V / max(how.temperature, COLDEST), how, row.index)
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


def _draw(scores_V: torch.Tensor, how: Sampling, index: int) -> int:
    """A token after top_k, top_p and min_p in that order (as transformers; vLLM has min_p first):
    the inverse of the cumulative distribution, by id, at one uniform number named by (seed, index).
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
        before = ordered.cumsum(0) - ordered  # mass of better tokens: the first is always kept
        kept = kept[order[before < max(how.top_p, LEAST)].sort().values]
        ids, probs = kept if ids is None else ids[kept], probs[kept]
    if how.min_p > 0.0:
        kept = torch.nonzero(probs >= how.min_p * probs.max())[:, 0]
        ids, probs = kept if ids is None else ids[kept], probs[kept]

    cumulative = probs.double().cumsum(0)
    total = float(cumulative[-1])
    uniform = (_mix(_mix(how.seed) + index) >> 11) / 2**53
    # At most 1 - 2**-53, so the product is below total in fp64 and its place is that of a token.
    place = int(torch.searchsorted(cumulative, uniform * total, right=True))
    return place if ids is None else int(ids[place])


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014): 64 bits, each of them from every bit of ``x``.
    torch's CPU generator would look at the low 32 bits of a seed only."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
