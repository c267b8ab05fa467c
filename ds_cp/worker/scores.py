"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_cp.worker.uploads import on_device

SCORE_ROWS = 64  # prompt rows whose log-probabilities are held in fp32 at a time


class Score(NamedTuple):
    """Log-probability of one prompt token and the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def score_prompt(logits_TV: torch.Tensor, tokens: Sequence[int], top: int) -> list[Score]:
    """Log-probabilities (natural log, in fp32) of ``tokens``, token t by row t of ``logits_TV``
    ``[T, V]``, each with the ``top`` most likely ids. NaN where a row is not finite. Raises
    ``ValueError`` when the numbers of tokens and rows differ."""
    if len(tokens) != logits_TV.shape[0]:
        raise ValueError(f"{logits_TV.shape[0]} rows of logits for {len(tokens)} prompt tokens")
    scores: list[Score] = []
    for start in range(0, len(tokens), SCORE_ROWS):
        logprobs_SV = torch.log_softmax(logits_TV[start : start + SCORE_ROWS].float(), dim=-1)
        ids = on_device(tokens[start : start + SCORE_ROWS], torch.int64, logprobs_SV.device)
        count = min(top, logprobs_SV.shape[1])
        best = torch.topk(logprobs_SV, count)
        own = logprobs_SV.gather(1, ids[:, None])
        # One copy to the host; ids and fp32 numbers are exact in fp64.
        found = torch.cat((own.double(), best.indices.double(), best.values.double()), dim=1)
        for row in found.tolist():
            top_ids = [int(token) for token in row[1 : 1 + count]]
            scores.append(Score(row[0], tuple(zip(top_ids, row[1 + count :], strict=True))))
    return scores
