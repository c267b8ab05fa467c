"""Exact attention over ranks, usable on its own over a process group.

    span = Span(q_runs, k_runs)       # per rank: positions of its queries, positions of its keys
    out_THD = attention(q_THD, k_SGD, v_SGD, span, group, spec, mode="ring")

A mode is an order of folding partials: ``local`` (nothing to fold), ``ring`` (shards pass by) or
``tree`` (partials go up). See ``state`` for the shape legend and the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


from ds_cp.attention.kernels import Kernel, get_kernel
from ds_cp.attention.local import LocalAttention
from ds_cp.attention.ring import RingPassKV, RingPassQ
from ds_cp.attention.spec import KeyValues, LayerSpec, Span
from ds_cp.attention.state import Partial, add_sinks, empty_partial, merge, merge_all
from ds_cp.attention.tiles import check_runs
from ds_cp.attention.tree import TreeAttention
from ds_cp.comm.wire import Group

__all__ = [
    "BatchedDecode",
    "Kernel",
    "KeyValues",
    "LayerSpec",
    "LocalAttention",
    "Mode",
    "Partial",
    "Span",
    "add_sinks",
    "attention",
    "empty_partial",
    "finish",
    "get_kernel",
    "make_mode",
    "merge",
    "merge_all",
]


class Mode(Protocol):
    """The one signature of the modes: made once for a step's items, called once per layer.

    ``q[i]``: this rank's ``[T, H, D]`` of item i; ``kv[i]``: this rank's keys and values of it.
    Returns one partial per item, over all keys of the item.
    """

    def __call__(
        self,
        q: Sequence[torch.Tensor],
        kv: Sequence[KeyValues],
        kernel: Kernel,
        spec: LayerSpec,
    ) -> list[Partial]: ...


def make_mode(mode: str, ring_pass: str, items: Sequence[Span], group: Group) -> Mode:
    """The mode called ``mode`` ("local", "ring" or "tree") over these items.

    ``ring_pass`` ("kv" or "q") selects what travels in mode ring; the others ignore it. Raises
    ``ValueError`` for any other name.
    """
    if mode == "local":
        me = group.rank
        return LocalAttention([(span.q_runs[me], span.k_runs[me]) for span in items])
    if mode == "ring" and ring_pass == "kv":
        return RingPassKV(items, group)
    if mode == "ring" and ring_pass == "q":
        return RingPassQ(items, group)
    if mode == "tree":
        return TreeAttention(items, group)
    raise ValueError(f"mode {mode!r} with ring_pass {ring_pass!r} does not exist")


def finish(part: Partial, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
    """The attention output ``[T, H, D]`` of a partial over all keys: sinks once, one final cast."""
    if spec.sinks is not None:
        part = add_sinks(part, spec.sinks)
    return part.out.to(dtype)


def attention(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    span: Span,
    group: Group,
    spec: LayerSpec,
    *,
    mode: str = "ring",
    ring_pass: str = "kv",
    kernel: str = "auto",
) -> torch.Tensor:
    """Exact causal attention of one sequence spread over ``group``; every member calls it.

    ``q_THD``: this rank's queries at ``span.q_runs[group.rank]``; ``k_SGD`` and ``v_SGD``: this
    rank's keys and values at ``span.k_runs[group.rank]``, rotary embedding applied. Returns ``[T,
    H, D]`` in q's dtype. The tensors may have any strides. Raises ``ValueError`` when tensors,
    positions and spec disagree, ``CommError`` when a peer does not answer.
    """
    me = group.rank
    _check_tensors(q_THD, k_SGD, v_SGD, spec)
    check_runs(span.q_runs[me], span.k_runs[me], q_THD.shape[0], k_SGD.shape[0])
    _, chosen = get_kernel(kernel, q_THD.device, q_THD.dtype)
    kv = KeyValues(((k_SGD, v_SGD),))
    [part] = make_mode(mode, ring_pass, [span], group)([q_THD], [kv], chosen, spec)
    return finish(part, spec, q_THD.dtype)


def _check_tensors(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, spec: LayerSpec
) -> None:
    """Raise ``ValueError`` for shapes, dtypes or devices that do not fit together: the fused
    operators do not check them and would read beyond the tensors."""
    want_q = (*q_THD.shape[:1], spec.num_q_heads, spec.head_dim)
    want_kv = (*k_SGD.shape[:1], spec.num_kv_heads, spec.head_dim)
    if not (q_THD.shape == want_q and k_SGD.shape == v_SGD.shape == want_kv):
        raise ValueError(
            f"q {list(q_THD.shape)}, k {list(k_SGD.shape)} and v {list(v_SGD.shape)} "
            f"do not fit the layer: q must be [T, {spec.num_q_heads}, {spec.head_dim}], "
            f"k and v [S, {spec.num_kv_heads}, {spec.head_dim}]"
        )
    if not q_THD.dtype == k_SGD.dtype == v_SGD.dtype:
        raise ValueError(
            f"q, k and v must have one dtype, got {q_THD.dtype}, {k_SGD.dtype} and {v_SGD.dtype}"
        )
    if not q_THD.device == k_SGD.device == v_SGD.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q_THD.device}, {k_SGD.device} "
            f"and {v_SGD.device}"
        )
