"""Exact causal attention of one sequence over ranks, without model, cache or server.

torchrun --nproc-per-node 3 examples/attention.py
"""

from __future__ import annotations

import os

import torch

from ds_cp.attention import LayerSpec, Span, attention
from ds_cp.config import Config
from ds_cp.startup.join import join_job
from ds_cp.topology import detect

world, _ = join_job(detect(os.environ), Config(model="none"))
group = world.group("cp", [list(range(world.size))])

# 100 tokens, dealt out unevenly: each rank has the queries and keys of one run of positions.
tokens, heads, kv_heads, head_dim = 100, 8, 2, 32
cuts = [tokens * rank * rank // world.size**2 for rank in range(world.size + 1)]
runs = tuple(((a, b - a),) if b > a else () for a, b in zip(cuts, cuts[1:], strict=False))
first, last = cuts[group.rank], cuts[group.rank + 1]

torch.manual_seed(0)  # the same on every rank
q_THD, k_SGD, v_SGD = (torch.randn(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
spec = LayerSpec(heads, kv_heads, head_dim, head_dim**-0.5)

for mode in ("ring", "tree"):
    mine = slice(first, last)
    out_THD = attention(
        q_THD[mine], k_SGD[mine], v_SGD[mine], Span(runs, runs), group, spec, mode=mode
    )
    want_HTD = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q_THD, k_SGD, v_SGD)),
        is_causal=True,
        enable_gqa=True,
    )
    error = (out_THD - want_HTD.transpose(0, 1)[mine]).abs().max().item() if last > first else 0.0
    print(f"rank {group.rank} {mode}: {last - first} queries, error to fp64 {error:.1e}")
    assert error < 1e-5
world.leave()
