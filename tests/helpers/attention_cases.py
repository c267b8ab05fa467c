"""The cases of attention over ranks, and one case's error against fp64 over the whole sequence.

Used by the central test (tests/dist/test_attention_matrix.py) and by benchmarks/attention_error.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ds_cp.attention import LayerSpec, Span, attention
from ds_cp.layout import Runs, assign, join, positions, split_even, total
from tests.helpers.oracle import full_attention

# Largest error allowed, relative to the largest reference value; bf16: 2 ulps at that scale.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8}
HEADS = [(4, 4), (6, 2), (9, 3), (4, 1)]  # (H, G): MHA, GQA, SmolLM2's ratio, MQA


def make_span(case: dict[str, Any], size: int) -> Span:
    """New tokens by layout; earlier KV dealt in uneven pieces (some ranks may have none)."""
    new, past = case["new"], case["past"]
    counts = case.get("counts") or split_even(new, size)
    q_runs = assign(case["layout"], past, counts, case.get("unit", 1))
    earlier: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    at, turn = 0, 0
    while at < past:
        length = min(past - at, 5 + 7 * turn % 11)
        rank = case.get("home", turn % size)
        earlier[rank].append((at, length))
        at, turn = at + length, turn + 1
    k_runs = tuple(join(earlier[r]) + q_runs[r] for r in range(size))
    return Span(q_runs, tuple(join(runs) for runs in k_runs))


def tensors(
    case: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, k, v of the whole sequence in fp32, and the sinks if the case has some."""
    num_heads, num_kv_heads = case["heads"]
    gen = torch.Generator().manual_seed(7)
    length, dim = case["new"] + case["past"], 16
    q = torch.randn(length, num_heads, dim, generator=gen)
    k = torch.randn(length, num_kv_heads, dim, generator=gen)
    v = torch.randn(length, num_kv_heads, dim, generator=gen)
    sinks = torch.randn(num_heads, generator=gen) if case.get("sinks") else None
    return q, k, v, sinks


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The values of ``x [..., D]`` in memory whose last dimension is not dense.

    "swapped": the last two dimensions lie the other way round; "every_other": one of two numbers,
    NaN between them; "expanded": the first number of each row, D times (other values than x's).
    """
    if how == "swapped":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "every_other":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    assert how == "expanded"
    return x[..., :1].expand_as(x)


def at(x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """The rows of ``x`` at the positions of ``runs``, in storage order."""
    return x[torch.tensor(positions(runs), dtype=torch.int64)]


def one_case(group: Any, case: dict[str, Any], dtype: torch.dtype, mode: str, pass_: str) -> float:
    """Largest error of this rank's rows, relative to the largest reference value."""
    q, k, v, sinks = tensors(case)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    strided = case.get("strided", "")
    if case.get("how") == "expanded":
        q, k, v = (
            laid_out(x, "expanded") if n in strided else x
            for n, x in zip("qkv", (q, k, v), strict=True)
        )
    span = make_span(case, group.size)
    q_runs, k_runs = span.q_runs[group.rank], span.k_runs[group.rank]
    num_heads, num_kv_heads = case["heads"]
    spec = LayerSpec(
        num_heads, num_kv_heads, 16, 0.25, case.get("window"), case.get("softcap"), sinks
    )
    mine_q, mine_k, mine_v = (
        laid_out(x, case["how"]) if name in strided else x
        for name, x in zip("qkv", (at(q, q_runs), at(k, k_runs), at(v, k_runs)), strict=True)
    )
    out = attention(
        mine_q, mine_k, mine_v, span, group, spec,
        mode=mode, ring_pass=pass_, kernel=case.get("kernel", "auto"),
    )  # fmt: skip
    assert out.dtype == dtype and out.shape == (total(q_runs), num_heads, 16)
    everything = torch.arange(case["past"] + case["new"])
    ref, _ = full_attention(
        q[case["past"] :], k, v, everything[case["past"] :], everything,
        scale=0.25, window=case.get("window"), softcap=case.get("softcap"), sinks=sinks,
    )  # fmt: skip
    mine = ref[torch.tensor(positions(q_runs), dtype=torch.int64) - case["past"]]
    if not mine.numel():
        return 0.0
    return float((out.double() - mine).abs().max() / ref.abs().max())


def cases(size: int) -> list[dict[str, Any]]:
    """Lengths that do not divide, below N, one token, with and without earlier KV, empty ranks."""
    out: list[dict[str, Any]] = []
    lengths = [(1, 0), (2, 0), (size * 2 + 1, 0), (37, 0), (61, 23), (1, 50), (3, 7), (40, 40)]
    for (new, past), layout, heads in itertools.product(lengths, ("zigzag", "contiguous"), HEADS):
        out.append({"new": new, "past": past, "layout": layout, "heads": heads})
    base = {"new": 45, "past": 31, "layout": "zigzag", "heads": (6, 2)}
    out += [{**base, "window": w} for w in (1, 5, 16, 200)]
    out += [{**base, "new": 600, "window": 50}, {**base, "softcap": 2.0}, {**base, "sinks": True}]
    out += [{**base, "softcap": 3.0, "window": 9, "sinks": True}]
    out += [{**base, "kernel": "reference"}, {**base, "kernel": "reference", "window": 7}]
    out += [{**base, "home": 0}, {**base, "home": size - 1, "new": 1}]
    out += [
        {**base, "counts": [45] + [0] * (size - 1)},
        {**base, "counts": [0] * (size - 1) + [45]},
    ]
    out += [{**base, "unit": 8}, {**base, "counts": split_even(45, size)[::-1], "unit": 4}]
    return out


def strided_cases(size: int) -> list[dict[str, Any]]:
    """Memory whose last dimension is not dense, for q, k, v and all of them: a prompt with earlier
    KV, a decode step with a window, and by the plain kernel."""
    base = {"new": 29, "past": 8, "layout": "zigzag", "heads": (6, 2)}
    kinds: list[dict[str, Any]] = [
        base,
        {**base, "new": 1, "past": 40, "home": size - 1, "window": 17},
        {**base, "heads": (2, 2), "kernel": "reference"},
    ]
    return [
        {**kind, "how": how, "strided": strided}
        for kind in kinds
        for how in ("swapped", "every_other", "expanded")
        for strided in ("q", "k", "v", "qkv")
    ]
