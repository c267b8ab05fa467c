"""Tokens chosen for many rows of logits at once: the way of a GPU.

A fixed number of operations whatever the number of rows, a few copies to the device that nothing
waits for, and one copy back with all that was found; where rows filter tokens, ``draw`` waits for
two sizes more. Gives what ``one_row`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.plan import Sampled
from ds_cp.worker.choose import COLDEST, HIGHEST, LEAST, Row, best_ids
from ds_cp.worker.draw import draw
from ds_cp.worker.history import update
from ds_cp.worker.uploads import on_device


def sample_together(
    logits_RV: torch.Tensor, best_R: torch.Tensor, which: Sequence[int], rows: Sequence[Row]
) -> list[Sampled]:
    """Choose for ``rows``, the rows ``which`` of ``logits_RV``, in any way of choosing. ``best_R``:
    ``best_ids`` of all rows. Raises ``ValueError`` for ids that are none."""
    V, device = logits_RV.shape[1], logits_RV.device
    _check_ids(rows, V)
    picked = on_device(which, torch.int64, device)
    fine_S = best_R[picked] >= 0
    scores_SV = logits_RV[picked].float()  # a copy, as it was indexed
    _add_biases(scores_SV, rows)
    logprobs = _LogProbs(scores_SV, rows)  # before what follows changes the scores
    # vLLM's order: logit_bias, repetition, frequency, presence. A ban may stand anywhere in it, as
    # nothing brings a token back from -inf.
    _penalize(scores_SV, rows)
    _ban(scores_SV, rows)
    tokens_S = torch.where(fine_S, _pick(scores_SV, rows), -1)
    return logprobs.finish(tokens_S)


def _pick(scores_SV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The best of rows at temperature 0, else a draw; -1 where no score is finite. ``[S]``."""
    device = scores_SV.device
    cold = [i for i, row in enumerate(rows) if row.how.temperature == 0.0]
    warm = [i for i, row in enumerate(rows) if row.how.temperature != 0.0]
    tokens_S = torch.empty(len(rows), dtype=torch.int64, device=device)
    if cold:
        at = on_device(cold, torch.int64, device)
        tokens_S[at] = best_ids(scores_SV if not warm else scores_SV[at])
    if warm:
        at = on_device(warm, torch.int64, device)
        some = [rows[i] for i in warm]
        temperatures = [max(row.how.temperature, COLDEST) for row in some]
        heat = on_device(temperatures, torch.float32, device)[:, None]
        warm_SV = (scores_SV if not cold else scores_SV[at]).div_(heat)
        drawn = draw(warm_SV, [row.how for row in some], [row.uniform for row in some])
        tokens_S[at] = torch.where(torch.isfinite(warm_SV.amax(dim=1)), drawn, -1)
    return tokens_S


def _check_ids(rows: Sequence[Row], V: int) -> None:
    """Raise ``ValueError`` for ids that are none: on a CUDA device an index outside a tensor ends
    the process."""
    for row in rows:
        for token in (*(t for t, _ in row.how.logit_bias), *row.how.early_banned):
            if not 0 <= token < V:
                raise ValueError(f"token id {token} in a vocabulary of {V}")


def _places(
    scores_SV: torch.Tensor, ids: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Row and id of each of ``ids[row]``; None when there is none."""
    rows = [row for row, some in enumerate(ids) for _ in some]
    if not rows:
        return None
    both = on_device([*rows, *(t for some in ids for t in some)], torch.int64, scores_SV.device)
    return both[: len(rows)], both[len(rows) :]


def _add_biases(scores_SV: torch.Tensor, rows: Sequence[Row]) -> None:
    at = _places(scores_SV, [[t for t, _ in row.how.logit_bias] for row in rows])
    if at is not None:
        values = [bias for row in rows for _, bias in row.how.logit_bias]
        scores_SV[at] += on_device(values, scores_SV.dtype, scores_SV.device)  # ids come once


def _ban(scores_SV: torch.Tensor, rows: Sequence[Row]) -> None:
    at = _places(scores_SV, [row.how.early_banned if row.bans else () for row in rows])
    if at is not None:
        scores_SV[at] = -torch.inf


def _penalize(scores_SV: torch.Tensor, rows: Sequence[Row]) -> None:
    """repetition_penalty on tokens of the prompt and the output, then frequency_penalty (per
    occurrence) and presence_penalty (once) on tokens of the output."""
    device = scores_SV.device
    back = [i for i, row in enumerate(rows) if row.how.penalizes]
    if not back:
        return
    histories = []
    for i in back:
        history = rows[i].history
        assert history is not None, "penalties need the tokens so far"
        histories.append(history)
    update(histories, device)
    outputs = [history.output(device) for history in histories]
    ways = [rows[i].how for i in back]
    seen = [
        (i, max(way.repetition_penalty, LEAST), (history.prompt_ids(device), ids))
        for i, way, history, (ids, _) in zip(back, ways, histories, outputs, strict=True)
        if way.repetition_penalty != 1.0
    ]
    if seen:
        # An id that is in both is written twice, with the same score.
        ids = torch.cat([some for _, _, both in seen for some in both])
        lengths = [sum(len(some) for some in both) for _, _, both in seen]
        row_of = _repeated([i for i, _, _ in seen], lengths, torch.int64, device)
        penalty = _repeated([p for _, p, _ in seen], lengths, torch.float32, device)
        score = scores_SV[row_of, ids]
        score = torch.where(score > 0, score / penalty, score * penalty).clamp_(max=HIGHEST)
        scores_SV[row_of, ids] = score
    counted = [
        (i, way.frequency_penalty, way.presence_penalty, *output)
        for i, way, output in zip(back, ways, outputs, strict=True)
        if way.frequency_penalty != 0.0 or way.presence_penalty != 0.0
    ]
    if counted:
        lengths = [len(ids) for *_, ids, _ in counted]
        row_of = _repeated([c[0] for c in counted], lengths, torch.int64, device)
        each = _repeated([c[1] for c in counted], lengths, torch.float32, device)
        once = _repeated([c[2] for c in counted], lengths, torch.float32, device)
        ids = torch.cat([c[3] for c in counted])
        counts = torch.cat([c[4] for c in counted])
        scores_SV[row_of, ids] -= each * counts + once


def _repeated(
    values: Sequence[int] | Sequence[float],
    lengths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Each value as often as its length says."""
    times = on_device(lengths, torch.int64, device)
    vector = on_device(values, dtype, device)
    return vector.repeat_interleave(times, output_size=sum(lengths))


class _LogProbs:
    """Log-probabilities of the rows that want some, kept until their tokens are drawn."""

    def __init__(self, scores_SV: torch.Tensor, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._want = [i for i, row in enumerate(rows) if row.how.logprobs >= 0]
        self._top: dict[int, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
        if not self._want:
            return
        device = scores_SV.device
        self._at = on_device(self._want, torch.int64, device)
        some = scores_SV if len(self._want) == len(rows) else scores_SV[self._at]
        self._logprobs_WV = torch.log_softmax(some, dim=-1)
        counts = [min(rows[i].how.logprobs, scores_SV.shape[1]) for i in self._want]
        # Which of equals are among the best depends on how many are asked for, so that rows are
        # asked by that number, not by the largest one of their company.
        for count in sorted(set(counts) - {0}):
            lot = [w for w, n in enumerate(counts) if n == count]
            part = self._logprobs_WV
            if len(lot) < len(counts):
                part = part[on_device(lot, torch.int64, device)]
            best = torch.topk(part, count)
            self._top[count] = [self._want[w] for w in lot], best.indices, best.values

    def finish(self, tokens_S: torch.Tensor) -> list[Sampled]:
        """What was sampled in each row, by one copy to the host: tokens (ids are exact in fp64),
        log-probabilities, ids and values of the best."""
        rows = self._rows
        parts = [tokens_S.double()]
        if self._want:
            own = tokens_S[self._at].clamp(min=0)
            parts.append(self._logprobs_WV.gather(1, own[:, None])[:, 0].double())
        for _, ids, values in self._top.values():
            parts += [ids.double().flatten(), values.double().flatten()]
        found = torch.cat(parts).tolist() if len(parts) > 1 else parts[0].tolist()
        tokens = [int(token) for token in found[: len(rows)]]
        at = len(rows) + len(self._want)
        logprobs = dict(zip(self._want, found[len(rows) : at], strict=True))
        tops: dict[int, tuple[tuple[int, float], ...]] = {}
        for count, (lot, _, _) in self._top.items():
            half = at + len(lot) * count
            for n, i in enumerate(lot):
                top_ids = [int(token) for token in found[at + n * count : at + (n + 1) * count]]
                top_values = found[half + n * count : half + (n + 1) * count]
                tops[i] = tuple(zip(top_ids, top_values, strict=True))
            at = half + len(lot) * count
        return [
            Sampled(row.request, token, 0.0)
            if token < 0
            else Sampled(row.request, token, logprobs.get(i, 0.0), tops.get(i, ()))
            for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
        ]
