"""Partials of attention and their merge: the one idea that everything else here folds.

Shape letters, one legend for the package: T query tokens, S key tokens, H query heads, G KV heads,
D head dim, V vocabulary, L layers, N ranks. ``q_THD`` is ``[T, H, D]``; query head h reads KV head
``h // (H // G)``.

A *partial* is attention of T queries over some subset of the keys: the normalised output and the
log-sum-exp (natural log) of the scaled scores. Partials of disjoint subsets merge into the partial
of their union; the empty subset is ``(0, -inf)``. See "Ring Attention" (arXiv 2310.01889), "Tree
Attention" (arXiv 2408.04093, section 4) and FlashAttention's online softmax.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

NEG_INF = float("-inf")  # lse of a query that sees no key


@dataclass(frozen=True)
class Partial:
    """``out``: ``[T, H, D]``, normalised over the keys seen; fp32 once merged, else the kernel's
    own dtype. ``lse``: ``[T, H]`` fp32, natural log; ``-inf`` where no key was seen, and out is 0
    there."""

    out: torch.Tensor
    lse: torch.Tensor


def dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself when its last dimension has stride 1, else a contiguous copy.

    Operators that read raw storage (fused attention, reinterpreting casts) take stride 1 for
    granted or refuse anything else. ``contiguous()`` is not enough: it leaves a last dimension of
    size 1 with whatever stride it has.
    """
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def split_heads(q_THD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[T, H, D]`` as ``[T, G, H/G, D]``, a view: the query heads of each KV head side by side."""
    num_tokens, num_heads, head_dim = q_THD.shape
    return q_THD.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)


def empty_partial(
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Partial:
    """The identity of ``merge``: out 0, lse -inf."""
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=dtype, device=device)
    lse = torch.full((num_tokens, num_heads), NEG_INF, dtype=dtype, device=device)
    return Partial(out, lse)


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint key sets, in fp32 (fp64 where a side is). Neither
    input is changed.

    Exact, associative and commutative up to rounding; an empty side leaves the other as it is, even
    if its output holds NaN, and two empty sides give the empty partial. Shapes as in ``Partial``.
    """
    dtype = torch.float64 if torch.float64 in (a.lse.dtype, b.lse.dtype) else torch.float32
    folded = Partial(a.out.to(dtype, copy=True), a.lse.to(dtype, copy=True))
    merge_rows(folded, b, None)
    return folded


def merge_all(parts: Iterable[Partial]) -> Partial:
    """Fold partials in the order given (fixed by the caller, so that runs repeat bit by bit).

    One partial is returned as it is. Raises ``ValueError`` when there is none.
    """
    folded: Partial | None = None
    owned = False  # the running partial may be overwritten once it is ours
    for part in parts:
        if folded is None:
            folded = part
        elif owned:
            merge_rows(folded, part, None)
        else:
            folded, owned = merge(folded, part), True
    if folded is None:
        raise ValueError("no partials to merge")
    return folded


def merge_rows(into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
    """Fold ``part`` into the rows ``rows`` (int64 ``[R]``, each once; None: all, in order) of
    ``into``, which is overwritten.

    out = (1 - w) a + w b with w = sigmoid(b.lse - a.lse), which is exact when one side is empty;
    the bare sigmoid form gives NaN for empty + empty and 0 * NaN for an empty side that holds NaN.
    No look at the values: nothing here waits for a device.
    """
    a_out, a_lse = (into.out, into.lse) if rows is None else (into.out[rows], into.lse[rows])
    b_out, b_lse = part.out.to(a_out.dtype), part.lse.to(a_lse.dtype)
    a_empty, b_empty = torch.isneginf(a_lse), torch.isneginf(b_lse)
    weight = torch.sigmoid(b_lse - a_lse).masked_fill_(b_empty, 0.0).unsqueeze(-1)
    a_out = torch.where(a_empty.unsqueeze(-1), 0.0, a_out)
    b_out = torch.where(b_empty.unsqueeze(-1), 0.0, b_out)
    out, lse = torch.lerp(a_out, b_out, weight), torch.logaddexp(a_lse, b_lse)
    if rows is None:
        into.out.copy_(out)
        into.lse.copy_(lse)
    else:
        into.out.index_copy_(0, rows, out)
        into.lse.index_copy_(0, rows, lse)


def add_sinks(part: Partial, sinks_H: torch.Tensor) -> Partial:
    """Let attention sinks (one logit per query head, no value) enter the denominator.

    Do it once per query, on the partial of all its keys. ``sinks_H``: ``[H]``.
    """
    lse = torch.logaddexp(part.lse, sinks_H.to(torch.float32))
    weight = torch.exp(part.lse - lse).masked_fill_(torch.isneginf(part.lse), 0.0)
    return Partial(part.out.to(torch.float32) * weight.unsqueeze(-1), lse)
