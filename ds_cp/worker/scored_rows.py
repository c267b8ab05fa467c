"""Log-probabilities of the prompt tokens of one step."""

from __future__ import annotations

import sys
import traceback

import torch

from ds_cp.worker.sampler import Score, score_prompt
from ds_cp.worker.step_context import StepContext


def score_rows(step: StepContext, logits_RV: torch.Tensor) -> list[Score | None]:
    """Log-probabilities of my prompt tokens that are to be scored, in order; None for those of a
    request whose scoring raises (the traceback goes to stderr): it must not end the others."""
    scores: list[Score | None] = []
    at = len(step.draws)
    for sequence, first, count, _ in step.scored:
        following = sequence.tokens[first + 1 : first + 1 + count]
        try:
            scores += score_prompt(
                logits_RV[at : at + count], following, sequence.sampling.prompt_logprobs
            )
        except Exception:
            print(f"ds_cp: error: request {sequence.number} cannot be scored", file=sys.stderr)
            traceback.print_exc()
            scores += [None] * count
        at += count
    return scores
