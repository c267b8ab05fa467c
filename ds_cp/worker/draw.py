"""Tokens drawn for many rows at once: filters and the draw itself as operations on all rows.

Nothing here looks at a value row by row. Rows are kept apart by the shape of the tensors, so a
row's token does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.plan import Sampling
from ds_cp.worker.choose import LEAST
from ds_cp.worker.uploads import on_device


def draw(
    scores_SV: torch.Tensor, ways: Sequence[Sampling], uniforms: Sequence[float]
) -> torch.Tensor:
    """A token of each row of ``scores_SV`` (fp32, after temperature), int64 ``[S]`` on its device.

    After top_k, top_p and min_p in that order (as transformers; vLLM has min_p first): the inverse
    of the cumulative distribution, by id, at the row's number of ``uniforms``, in [0, 1). A row
    without finite scores gets some id; the caller knows such rows.
    """
    V = scores_SV.shape[1]
    device = scores_SV.device
    numbers = on_device(uniforms, torch.float64, device)
    filtered = [i for i, way in enumerate(ways) if _filters(way, V)]
    if not filtered:
        return _invert(torch.softmax(scores_SV, dim=-1), numbers)
    if len(filtered) == len(ways):
        return _draw_filtered(scores_SV, ways, numbers)
    plain = [i for i, way in enumerate(ways) if not _filters(way, V)]
    first, second = (on_device(which, torch.int64, device) for which in (filtered, plain))
    some = [ways[i] for i in filtered]
    tokens = torch.empty(len(ways), dtype=torch.int64, device=device)
    tokens[first] = _draw_filtered(scores_SV[first], some, numbers[first])
    tokens[second] = _invert(torch.softmax(scores_SV[second], dim=-1), numbers[second])
    return tokens


def _filters(way: Sampling, V: int) -> bool:
    return 0 < way.top_k < V or way.top_p < 1.0 or way.min_p > 0.0


def _draw_filtered(
    scores_SV: torch.Tensor, ways: Sequence[Sampling], uniforms_S: torch.Tensor
) -> torch.Tensor:
    """As ``draw``, where every row has a filter.

    Tokens that drop out are left out: most often few remain to be sorted and summed. The host
    waits for two numbers, whatever the number of rows: how many remain, and the most of a row.
    """
    S, V = scores_SV.shape
    device = scores_SV.device
    floors_S = _top_k_floors(scores_SV, ways)
    if floors_S is not None:
        scores_SV = scores_SV.masked_fill(scores_SV < floors_S[:, None], -torch.inf)
    probs_SV = torch.softmax(scores_SV, dim=-1)
    # All tokens below this weigh less than 1 - top_p together, so top_p needs none of them, and
    # min_p none below its share of the best.
    least = [(1.0 - way.top_p) / (2 * V) if way.top_p < 1.0 else 0.0 for way in ways]
    least_S = on_device(least, torch.float32, device)
    min_p_S = on_device([way.min_p for way in ways], torch.float32, device)
    best_S = probs_SV.amax(dim=1)
    some_SV = (probs_SV > least_S[:, None]) & (probs_SV >= (min_p_S * best_S)[:, None])
    rows, ids = torch.nonzero(some_SV, as_tuple=True)
    counts_S = some_SV.sum(dim=1)
    width = max(1, int(counts_S.max()))
    places = torch.arange(len(rows), device=device) - (counts_S.cumsum(0) - counts_S)[rows]
    probs_SM = probs_SV.new_zeros(S, width)
    probs_SM[rows, places] = probs_SV[rows, ids]
    ids_SM = ids.new_zeros(S, width)
    ids_SM[rows, places] = ids
    probs_SM = _top_p(probs_SM, ways)
    place_S = _invert(probs_SM, uniforms_S)
    return ids_SM.gather(1, place_S[:, None])[:, 0]


def _top_k_floors(scores_SV: torch.Tensor, ways: Sequence[Sampling]) -> torch.Tensor | None:
    """The least score that top_k keeps, ``[S]``: equals of it stay. None when no row has one."""
    S, V = scores_SV.shape
    device = scores_SV.device
    floors_S: torch.Tensor | None = None
    lots: dict[int, list[int]] = {}  # rows by the size of top_k: a large one is paid by few
    for row, way in enumerate(ways):
        if 0 < way.top_k < V:
            lots.setdefault((way.top_k - 1).bit_length() // 3, []).append(row)
    for lot in lots.values():
        if floors_S is None:
            floors_S = scores_SV.new_full((S,), -torch.inf)
        which = on_device(lot, torch.int64, device)
        last = on_device([ways[row].top_k - 1 for row in lot], torch.int64, device)
        some = scores_SV if len(lot) == S else scores_SV[which]
        best = torch.topk(some, max(ways[row].top_k for row in lot)).values
        floors_S[which] = best.gather(1, last[:, None])[:, 0]
    return floors_S


def _top_p(probs_SM: torch.Tensor, ways: Sequence[Sampling]) -> torch.Tensor:
    """``probs_SM`` with 0 for what top_p drops: of the best tokens, the lower id first among
    equals, the smallest number with at least that mass."""
    which = [i for i, way in enumerate(ways) if way.top_p < 1.0]
    if not which:
        return probs_SM
    device = probs_SM.device
    rows = on_device(which, torch.int64, device)
    top_p = on_device([max(ways[i].top_p, LEAST) for i in which], torch.float64, device)
    some = probs_SM if len(which) == len(ways) else probs_SM[rows]
    ordered, order = torch.sort(some, dim=1, descending=True, stable=True)
    # Mass of better tokens: the first is always kept. In fp64, where the order in which a device
    # adds does not show.
    before = ordered.cumsum(1, dtype=torch.float64) - ordered
    kept = ordered.masked_fill(before >= top_p[:, None], 0.0)
    found = torch.empty_like(some).scatter_(1, order, kept)
    if some is probs_SM:
        return found
    return probs_SM.index_copy(0, rows, found)


def _invert(probs_SM: torch.Tensor, uniforms_S: torch.Tensor) -> torch.Tensor:
    """The first place in each row whose cumulative weight is above its number's share of all."""
    cumulative = probs_SM.cumsum(1, dtype=torch.float64)
    # At most 1 - 2**-53, so the product is below the total in fp64 and its place is that of a
    # token; a row that is no numbers gets the last place.
    share = uniforms_S * cumulative[:, -1]
    place = torch.searchsorted(cumulative, share[:, None], right=True)[:, 0]
    return place.clamp_(max=probs_SM.shape[1] - 1)
