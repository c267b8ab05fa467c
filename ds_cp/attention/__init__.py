"""Exact attention over ranks, usable on its own over a process group.

    span = Span(q_runs, k_runs)       # per rank: positions of its queries, positions of its keys
    out_THD = attention(q_THD, k_SGD, v_SGD, span, group, spec, mode="ring")

A mode is an order of folding partials: ``local`` (nothing to fold), ``ring`` (shards pass by) or
``tree`` (partials go up). See ``state`` for the shape legend and the merge, ``pages`` and ``batch``
for what a kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.attention.batch import IndexUpload, Shards, blocks_of_runs
from ds_cp.attention.kernels import PagedKernel, choose_kernel
from ds_cp.attention.local import LocalAttention
from ds_cp.attention.mode import Mode
from ds_cp.attention.pages import Pages, PageShape, empty_pages
from ds_cp.attention.ring import RingPassKV, RingPassQ
from ds_cp.attention.spec import LayerSpec, Span
from ds_cp.attention.state import Partial, add_sinks, empty_partial, merge, merge_all
from ds_cp.attention.tiles import check_runs
from ds_cp.attention.tree import TreeAttention, TreeRoutes
from ds_cp.comm.wire import Group
from ds_cp.layout import Runs, positions

__all__ = [
    "LayerSpec",
    "LocalAttention",
    "Mode",
    "PageShape",
    "PagedKernel",
    "Pages",
    "Partial",
    "Shards",
    "Span",
    "TreeRoutes",
    "add_sinks",
    "attention",
    "choose_kernel",
    "empty_partial",
    "finish",
    "make_mode",
    "merge",
    "merge_all",
]

BLOCK_SIZE = 64  # tokens of a block of the pages that ``attention`` makes
NAME_BYTES = 32  # of a kernel's name, as ranks tell it each other
SCHEME_KERNEL = "kernel_name"  # name in the ledger


def make_mode(
    mode: str,
    ring_pass: str,
    items: Sequence[Shards],
    group: Group,
    first_row: int,
    windows: Sequence[int | None],
    upload: IndexUpload,
    routes: TreeRoutes,
) -> Mode:
    """The mode called ``mode`` ("local", "ring" or "tree") over these items of one step.

    ``ring_pass`` ("kv" or "q") selects what travels in mode ring. My rows of the items follow one
    another from ``first_row`` of the step's queries on; ``windows``: those of the layers that it
    will be called for; ``upload`` gets its index vectors; ``routes`` keeps those of trees from step
    to step. Raises ``ValueError`` for any other name.
    """
    if mode == "local":
        return LocalAttention(items, group.rank, first_row, upload)
    if mode == "ring" and ring_pass == "kv":
        return RingPassKV(items, group, first_row, windows, upload)
    if mode == "ring" and ring_pass == "q":
        return RingPassQ(items, group, first_row, windows, upload)
    if mode == "tree":
        return TreeAttention(items, group, first_row, windows, upload, routes)
    raise ValueError(f"mode {mode!r} with ring_pass {ring_pass!r} does not exist")


def finish(part: Partial, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
    """The attention output ``[T, H, Dv]`` of a partial over all keys: sinks once, one final
    cast."""
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
    kernel: str | PagedKernel = "auto",
) -> torch.Tensor:
    """Exact causal attention of one sequence spread over ``group``; every member calls it.

    ``q_THD``: this rank's queries at ``span.q_runs[group.rank]``; ``k_SGD`` and ``v_SGD``: this
    rank's keys and values at ``span.k_runs[group.rank]``, rotary embedding applied. ``kernel``: a
    name as in ``attention.backend``, or one that ``choose_kernel`` gave, which is the way for
    repeated calls: a name is looked up each time, unchecked, and on CUDA "auto" is then triton
    without dense operators. Returns ``[T, H, Dv]`` in q's dtype. The tensors may have any strides.
    fp64 ones are attended in fp64, but where partials travel (ring pass-Q, tree) their lse is fp32.
    Raises ``ValueError`` when tensors, positions and spec disagree, or the kernels that a name gave
    on the ranks; ``CommError`` when a peer does not answer.
    """
    me, device = group.rank, q_THD.device
    _check_tensors(q_THD, k_SGD, v_SGD, spec)
    check_runs(span.q_runs[me], span.k_runs[me], q_THD.shape[0], k_SGD.shape[0])
    if isinstance(kernel, str):
        chosen = choose_kernel(kernel, device, q_THD.dtype, [spec], BLOCK_SIZE, check=False)
        kernel = chosen.kernel
        if mode != "local":
            _check_kernels(kernel, group, device)
    upload = IndexUpload()
    items = [
        Shards(
            tuple(tuple(sorted(runs)) for runs in span.q_runs),
            tuple(blocks_of_runs(runs, BLOCK_SIZE) for runs in span.k_runs),
        )
    ]
    one = make_mode(mode, ring_pass, items, group, 0, [spec.window], upload, TreeRoutes())
    upload.send(device)
    pages = _filled(k_SGD, v_SGD, span.k_runs[me], spec, kernel)
    at = torch.tensor(positions(span.q_runs[me]), dtype=torch.int64, device=device)
    order = at.argsort()
    double = q_THD.dtype == torch.float64
    into = empty_partial(
        len(at), spec.num_q_heads, spec.v_dim, device, torch.float64 if double else torch.float32
    )
    one(q_THD[order], at[order], pages, kernel, spec, into)
    out = finish(into, spec, q_THD.dtype)
    return torch.empty_like(out).index_copy_(0, order, out)


def _check_kernels(kernel: PagedKernel, group: Group, device: torch.device) -> None:
    """Raise ``ValueError``, on every rank, when the ranks have chosen different kernels: pages
    travel as they lie, and would be read in another order."""
    peers = [r for r in range(group.size) if r != group.rank]
    mine = torch.tensor(list(kernel.name.encode()[:NAME_BYTES].ljust(NAME_BYTES)))
    mine = mine.to(device=device, dtype=torch.uint8)
    recvs = [(r, torch.empty_like(mine)) for r in peers]
    group.exchange([(r, mine) for r in peers], recvs, SCHEME_KERNEL).wait()
    names = {bytes(x.tolist()).decode().strip() for x in (mine, *(x for _, x in recvs))}
    if len(names) > 1:
        raise ValueError(f"ranks chose kernels {' and '.join(sorted(names))}: pass kernel=...")


def _filled(
    k_SGD: torch.Tensor, v_SGD: torch.Tensor, runs: Runs, spec: LayerSpec, kernel: PagedKernel
) -> Pages:
    """Pages with a rank's keys and values, in the blocks that ``blocks_of_runs`` names."""
    device, size = k_SGD.device, BLOCK_SIZE
    shape = PageShape.of(spec, size, k_SGD.dtype, kernel.packed)
    starts, blocks, places = 0, [], []
    for _, length in runs:
        blocks += [starts + i // size for i in range(length)]
        places += [i % size for i in range(length)]
        starts += -(-length // size)
    pages = empty_pages(shape, starts, device)
    if blocks:
        at = torch.tensor([blocks, places], device=device)
        kernel.write(pages, k_SGD, v_SGD, at[0], at[1])
    return pages


def _check_tensors(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, spec: LayerSpec
) -> None:
    """Raise ``ValueError`` for shapes, dtypes or devices that do not fit together: kernels do not
    check them and would read beyond the tensors."""
    want_q = (*q_THD.shape[:1], spec.num_q_heads, spec.head_dim)
    want_k = (*k_SGD.shape[:1], spec.num_kv_heads, spec.head_dim)
    want_v = (*k_SGD.shape[:1], spec.num_kv_heads, spec.v_dim)
    if not (q_THD.shape == want_q and k_SGD.shape == want_k and v_SGD.shape == want_v):
        same = spec.v_dim == spec.head_dim
        kv = f"k and v [S, {spec.num_kv_heads}, {spec.head_dim}]" if same else (
            f"k [S, {spec.num_kv_heads}, {spec.head_dim}] "
            f"and v [S, {spec.num_kv_heads}, {spec.v_dim}]"
        )  # fmt: skip
        raise ValueError(
            f"q {list(q_THD.shape)}, k {list(k_SGD.shape)} and v {list(v_SGD.shape)} "
            f"do not fit the layer: q must be [T, {spec.num_q_heads}, {spec.head_dim}], {kv}"
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
