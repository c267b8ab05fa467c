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
    num_tokens: int, num_heads: int, head_dim: int, device: torch.device | str = "cpu"
) -> Partial:
    """The identity of ``merge``: out 0, lse -inf, fp32."""
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.full((num_tokens, num_heads), NEG_INF, dtype=torch.float32, device=device)
    return Partial(out, lse)


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of the union of two disjoint key sets, in fp32. Neither input is changed.

    Exact, associative and commutative up to rounding; an empty side leaves the other as it is, even
    if its output holds NaN, and two empty sides give the empty partial. Shapes as in ``Partial``.
    """
    out = a.out.to(torch.float32, copy=True)
    return _fold(Partial(out, a.lse.to(torch.float32)), b)


def merge_all(parts: Iterable[Partial]) -> Partial:
    """Fold partials in the order given (fixed by the caller, so that runs repeat bit by bit).

    One partial is returned as it is. Raises ``ValueError`` when there is none.
    """
    folded: Partial | None = None
    owned = False  # the running sum may be written in place once it is ours
    for part in parts:
        if folded is None:
            folded = part
        elif owned:
            folded = _fold(folded, part)
        else:
            folded, owned = merge(folded, part), True
    if folded is None:
        raise ValueError("no partials to merge")
    return folded


def _fold(a: Partial, b: Partial) -> Partial:
    """Merge ``b`` into ``a`` (fp32, overwritten).

    out = (1 - w) a + w b with w = sigmoid(b.lse - a.lse), which is exact when one side is empty;
    the bare sigmoid form gives NaN for empty + empty and 0 * NaN for an empty side that holds NaN.
    """
    a_empty, b_empty = torch.isneginf(a.lse), torch.isneginf(b.lse)
    lse = torch.logaddexp(a.lse, b.lse)
    weight = torch.sigmoid(b.lse - a.lse).masked_fill_(b_empty, 0.0)
    a_out, b_out = a.out, b.out.to(torch.float32)
    if _may_hold(a_empty):
        a_out = a_out.masked_fill_(a_empty.unsqueeze(-1), 0.0)
    if _may_hold(b_empty):
        b_out = b_out.masked_fill(b_empty.unsqueeze(-1), 0.0)
    return Partial(a_out.lerp_(b_out, weight.unsqueeze(-1)), lse)


def _may_hold(flags: torch.Tensor) -> bool:
    """False when no flag is set, where that is cheap to know. On a CPU the look saves a pass over
    the output; on other devices it would stop the host at every merge until the device is done."""
    return flags.device.type != "cpu" or bool(flags.any())


def add_sinks(part: Partial, sinks_H: torch.Tensor) -> Partial:
    """Let attention sinks (one logit per query head, no value) enter the denominator.

    Do it once per query, on the partial of all its keys. ``sinks_H``: ``[H]``.
    """
    lse = torch.logaddexp(part.lse, sinks_H.to(torch.float32))
    weight = torch.exp(part.lse - lse).masked_fill_(torch.isneginf(part.lse), 0.0)
    return Partial(part.out.to(torch.float32) * weight.unsqueeze(-1), lse)
