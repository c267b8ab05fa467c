"""From logits to tokens and log-probabilities, on the owner of a row only."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import torch

from ds_cp.plan import Sampled
from ds_cp.worker.choose import Row, best_ids
from ds_cp.worker.history import History
from ds_cp.worker.masks import masked
from ds_cp.worker.one_row import sample_one
from ds_cp.worker.scores import Score, score_prompt
from ds_cp.worker.together import sample_together

__all__ = ["History", "Row", "Score", "sample_rows", "score_prompt"]

TOGETHER = 2**25  # scores that are chosen from at once on a GPU; bounds some copies in fp64


def sample_rows(logits_RV: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Choose the next token of each row of ``logits_RV`` ``[R, V]``.

    A row's token depends on that row alone, and its random number on (seed, index) alone.
    Temperature 0 is greedy, the lowest id of equals. Log-probabilities are of the logits with
    ``logit_bias``, before penalties, bans and filters, and under a grammar of the tokens that it
    allows. A row gets token -1 when its logits are not finite, when nothing is allowed, or when
    drawing it raises (the traceback goes to stderr): it must not end the others. ``logits_RV`` is
    not changed. Raises ``ValueError`` when the numbers of rows differ.
    """
    if len(rows) != logits_RV.shape[0]:
        raise ValueError(f"{logits_RV.shape[0]} rows of logits for {len(rows)} tokens to draw")
    if not rows:
        return []
    logits_RV = masked(logits_RV, rows)
    best_R = best_ids(logits_RV)
    if logits_RV.device.type != "cpu":
        return _in_lots(logits_RV, best_R, rows)
    return [
        Sampled(row.request, token, 0.0) if token < 0 or row.is_plain else _alone(logits_V, row)
        for row, token, logits_V in zip(rows, best_R.tolist(), logits_RV, strict=True)
    ]


def _in_lots(logits_RV: torch.Tensor, best_R: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Rows that want more than the best are chosen together, as many as memory is set aside for."""
    wanted = [i for i, row in enumerate(rows) if not row.is_plain]
    if not wanted:
        plain = zip(rows, best_R.tolist(), strict=True)
        return [Sampled(row.request, token, 0.0) for row, token in plain]
    chosen: dict[int, Sampled] = {}
    size = max(1, TOGETHER // logits_RV.shape[1])
    for at in range(0, len(wanted), size):
        which = wanted[at : at + size]
        found = _guarded(logits_RV, best_R, which, [rows[i] for i in which])
        chosen.update(zip(which, found, strict=True))
    tokens = best_R.tolist() if len(wanted) < len(rows) else [-1] * len(rows)
    return [
        chosen[i] if i in chosen else Sampled(row.request, token, 0.0)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
    ]


def _guarded(
    logits_RV: torch.Tensor, best_R: torch.Tensor, which: Sequence[int], rows: Sequence[Row]
) -> list[Sampled]:
    """``sample_together``, or when it raises, the same row by row to find out whose fault it is."""
    try:
        return sample_together(logits_RV, best_R, which, rows)
    except Exception:
        if len(rows) == 1:
            return [_failed(rows[0])]
        alone = zip(which, rows, strict=True)
        return [_guarded(logits_RV, best_R, [i], [row])[0] for i, row in alone]


def _alone(logits_V: torch.Tensor, row: Row) -> Sampled:
    try:
        return sample_one(logits_V.float(), row)
    except Exception:
        return _failed(row)


def _failed(row: Row) -> Sampled:
    """The row that raises, with its traceback on stderr."""
    print(f"ds_cp: error: request {row.request} cannot be drawn from", file=sys.stderr)
    traceback.print_exc()
    return Sampled(row.request, -1, 0.0)
