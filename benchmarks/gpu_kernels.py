"""Sections of ``benchmarks.gpu`` that time kernels: prefill, paged decode, merge."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu_common import attempt, row, seconds, section
from ds_cp.attention.batch import PagedBatch, Part, make_batch
from ds_cp.attention.kernels.choose import find_kernels
from ds_cp.attention.kernels.dense import Candidate, DenseError, candidates
from ds_cp.attention.pages import Fresh, Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import empty_partial, merge_rows
from ds_cp.layout import Block, Blocks

H, G, D, SIZE = 32, 8, 128, 64  # query heads, KV heads, head dim, tokens a block


def layer(quick: bool) -> LayerSpec:
    return LayerSpec(4, 2, 64, 0.125) if quick else LayerSpec(H, G, D, D**-0.5)


def prefill(device: torch.device, quick: bool) -> None:
    """TFLOP/s of a causal prompt with lse: each operator, our paged kernel alone, and through our
    interface."""
    spec = layer(quick)
    for rows in (300,) if quick else (8192, 32768, 131072):
        attempt(f"prefill {rows}", _prefill, rows, spec, device)
    for choice in candidates(device):
        attempt(f"first call, {choice.name}", _first_calls, choice, spec, device)


def _first_calls(choice: Candidate, spec: LayerSpec, device: torch.device) -> None:
    """What a chunk of a new length costs in the request's path, where a plan is built for each."""
    try:
        dense = choice.load()
    except DenseError:
        return
    times: list[list[float]] = [[], []]
    for length in (2048, 2048 + 64, 2048 + 131, 2048 + 777):  # the first one loads what all need
        q, k, v = (
            torch.randn(n, length, spec.head_dim, device=device).to(torch.bfloat16).transpose(0, 1)
            for n in (spec.num_q_heads, spec.num_kv_heads, spec.num_kv_heads)
        )
        for some in times:
            torch.cuda.synchronize()
            began = time.perf_counter()
            dense(q, k, v, spec.scale, True)
            torch.cuda.synchronize()
            some.append(time.perf_counter() - began)
    first, again = (max(some[1:]) * 1e3 for some in times)
    row(f"first call at a new length, {choice.name}", value=f"{first:.2f} ms",
        against=f"{again:.2f} ms the second time")  # fmt: skip


def _prefill(rows: int, spec: LayerSpec, device: torch.device) -> None:
    q, k, v, pages, batch = prompt(rows, spec, device)
    flop = 2.0 * rows * rows * spec.num_q_heads * spec.head_dim
    positions = torch.arange(rows, device=device)
    found: dict[str, float] = {}

    def add(name: str, work: Callable[[], Any]) -> None:
        def timed() -> None:
            found[name] = flop / seconds(work, device) / 1e12
            row(f"prefill {rows}, {name}", value=f"{found[name]:.4g} TFLOP/s")

        attempt(f"prefill {rows}, {name}", timed)

    for choice in candidates(device):
        try:
            dense = choice.load()
        except DenseError:
            continue
        add(choice.name, partial(dense, q, k, v, spec.scale, True))
    heads = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    add("F.scaled_dot_product_attention", lambda: functional.scaled_dot_product_attention(
        *heads, is_causal=True, scale=spec.scale, enable_gqa=True))  # fmt: skip
    best = max(found, key=lambda name: found[name])
    for name in ("cuda", "triton", "cpu", "sdpa"):
        kernel = kernel_of(name, spec, device)
        if kernel is None:
            continue
        add(
            f"kernel {name}, partial",
            partial(kernel.paged_attention, q, positions, pages, batch, spec),
        )
        if name == "cuda":
            add(
                f"our interface, a whole prompt ({kernel.operator(spec, q.dtype)})",
                partial(kernel.prefill, q, k, v, batch, spec, SIZE),
            )
    ours = [value for name, value in found.items() if name.startswith("our interface")]
    if ours:
        ratio = ours[0] / found[best]
        row(f"prefill {rows}, ours / best", value=f"{ratio:.3f}", against=best, target=">= 0.98")


def flex(device: torch.device, quick: bool) -> None:
    """flex_attention, compiled, which takes long to compile: last."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type != "cuda":
        row("flex_attention", value="gives no lse on a CPU")
        return
    spec, rows = layer(quick), 1024 if quick else 32768
    q, k, v, _, _ = prompt(rows, spec, device)
    heads = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, rows, rows, device=device)
    call = torch.compile(flex_attention)

    def once() -> Any:
        return call(*heads, block_mask=mask, scale=spec.scale, enable_gqa=True, return_lse=True)

    flop = 2.0 * rows * rows * spec.num_q_heads * spec.head_dim
    row(f"prefill {rows}, flex", value=f"{flop / seconds(once, device) / 1e12:.4g} TFLOP/s")


def decode(device: torch.device, quick: bool) -> None:
    """Bytes of KV a second of one token over pages, with lse, against a copy and against the dense
    operators over the same keys side by side."""
    spec = layer(quick)
    size = 2**20 if quick else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / seconds(partial(target.copy_, source), device)
    row("copy", value=f"{copy / 1e9:.0f} GB/s")
    del source, target
    for keys in (256, 1000) if quick else (32768, 131072, 524288, 1048576):
        attempt(f"decode {keys}", _decode, keys, 1, spec, device, copy)
    attempt("decode 64 x", _decode, 64 if quick else 8192, 64, spec, device, copy)


def _decode(keys: int, rows: int, spec: LayerSpec, device: torch.device, copy: float) -> None:
    pages, parts = filled(keys, rows, spec, device)
    batch = make_batch(parts, device)
    q = torch.randn(rows, spec.num_q_heads, spec.head_dim, device=device).to(pages.data.dtype)
    positions = torch.full((rows,), keys - 1, device=device)
    moved = rows * keys * spec.num_kv_heads * 2 * spec.head_dim * pages.data.element_size()
    what = f"decode {rows} x {keys}"

    def add(name: str, work: Callable[[], Any]) -> None:
        def timed() -> None:
            speed = moved / seconds(work, device)
            target = ">= 0.85" if keys >= 131072 and name.startswith("kernel cuda") else ""
            row(f"{what}, {name}", value=f"{speed / 1e9:.0f} GB/s",
                against=f"{speed / copy:.2f} of copy", target=target)  # fmt: skip

        attempt(f"{what}, {name}", timed)

    for name in ("cuda", "cpu", "sdpa"):
        kernel = kernel_of(name, spec, device)
        if kernel is not None:
            add(f"kernel {name}", partial(kernel.paged_attention, q, positions, pages, batch, spec))
    if rows > 1:
        return
    k, v = pages.gather(batch.blocks)
    heads = [x.transpose(0, 1).unsqueeze(0) for x in (k[:keys], v[:keys])]
    folded = q.view(1, spec.num_kv_heads, -1, spec.head_dim)  # query heads of a KV head as rows
    add("peer: F.sdpa, keys side by side, heads folded, no lse", lambda: (
        functional.scaled_dot_product_attention(folded, *heads, scale=spec.scale)))  # fmt: skip
    for choice in candidates(device):
        try:
            dense = choice.load()
        except DenseError:
            continue
        add(
            f"peer: {choice.name}, keys side by side, lse",
            partial(dense, q, k[:keys], v[:keys], spec.scale, False),
        )


def merge(device: torch.device, quick: bool) -> None:
    """Bytes a second of folding a partial into a running one."""
    spec = layer(quick)
    kernel = kernel_of("cuda" if device.type == "cuda" else "sdpa", spec, device)
    for rows in (64,) if quick else (64, 8192):
        into, part = (empty_partial(rows, spec.num_q_heads, spec.v_dim, device) for _ in range(2))
        part.lse.fill_(1.0)
        moved = 3 * part.out.nbytes + 3 * part.lse.nbytes
        ways: dict[str, Callable[..., None]] = {"torch's operators": merge_rows}
        if kernel is not None:
            ways["ours"] = kernel.merge_rows
        for name, way in ways.items():
            took = seconds(partial(way, into, part, None), device)
            speed = f"{moved / took / 1e9:.0f} GB/s"
            row(f"merge {rows} rows, {name}", value=f"{took * 1e6:.1f} us", against=speed)


def kernel_of(name: str, spec: LayerSpec, device: torch.device) -> Any:
    """The kernel called so, None where it cannot be had."""
    try:
        found = find_kernels(name, device, torch.bfloat16, [spec], SIZE, check=False)
    except Exception:
        return None
    return found.kernels[0] if found.kernels else None


def filled(keys: int, rows: int, spec: LayerSpec, device: torch.device) -> tuple[Pages, list[Part]]:
    """Pages of random keys, and ``rows`` requests that each see ``keys`` of their own, with their
    blocks out of order."""
    each = -(-keys // SIZE)
    shape = PageShape.of(spec, SIZE, torch.bfloat16)
    pages = empty_pages(shape, each * rows, device)
    pages.data.normal_()
    order = torch.randperm(each * rows, generator=torch.Generator().manual_seed(0)).tolist()
    parts = []
    for n in range(rows):
        numbers = order[n * each : (n + 1) * each]
        held = [min(SIZE, keys - i * SIZE) for i in range(each)]
        blocks = Blocks(Block(b, i * SIZE, held[i]) for i, b in enumerate(numbers))
        parts.append(Part(((keys - 1, 1),), blocks))
    return pages, parts


def prompt(
    rows: int, spec: LayerSpec, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Pages, PagedBatch]:
    """A whole prompt as a layer leaves it, heads first, and stored."""
    q, k, v = (
        torch.randn(n, rows, spec.head_dim, device=device).to(torch.bfloat16).transpose(0, 1)
        for n in (spec.num_q_heads, spec.num_kv_heads, spec.num_kv_heads)
    )
    pages, [part] = filled(rows, 1, spec, device)
    at = torch.arange(rows, device=device)
    numbers = torch.tensor(part.blocks.numbers.tolist(), device=device)
    pages.write(k, v, numbers[at // SIZE], at % SIZE)
    batch = make_batch([Part(((0, rows),), part.blocks)], device)
    return q, k, v, Pages(pages.data, pages.shape, Fresh(q, k, v)), batch


if __name__ == "__main__":
    section({"prefill": prefill, "decode": decode, "merge": merge, "flex": flex})
