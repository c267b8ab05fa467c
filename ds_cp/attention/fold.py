"""A kernel over keys that lie in several pieces: one partial each, merged in storage order."""

from __future__ import annotations

from functools import lru_cache

import torch

from ds_cp.attention.kernels import Kernel
from ds_cp.attention.spec import KeyValues, LayerSpec
from ds_cp.attention.state import Partial, merge_all
from ds_cp.layout import Runs


def attend(
    kernel: Kernel,
    q_THD: torch.Tensor,
    kv: KeyValues,
    q_runs: Runs,
    k_runs: Runs,
    spec: LayerSpec,
) -> Partial:
    """Attention of the queries over all pieces of ``kv``, whose positions are ``k_runs``."""
    if len(kv.pieces) == 1:
        return kernel(q_THD, *kv.pieces[0], q_runs, k_runs, spec)
    lengths = tuple(k.shape[0] for k, _ in kv.pieces)
    return merge_all(
        kernel(q_THD, k, v, q_runs, runs, spec)
        for (k, v), runs in zip(kv.pieces, cut(k_runs, lengths), strict=True)
    )


@lru_cache(maxsize=1024)  # layers ask the same question in turn
def cut(runs: Runs, lengths: tuple[int, ...]) -> tuple[Runs, ...]:
    """Cut ``runs`` into consecutive parts of the given lengths, which sum to the whole."""
    parts: list[list[tuple[int, int]]] = [[] for _ in lengths]
    left, part = list(lengths), 0
    for start, length in runs:
        while length:
            while not left[part]:
                part += 1
            take = min(length, left[part])
            parts[part].append((start, take))
            start, length, left[part] = start + take, length - take, left[part] - take
    return tuple(tuple(part) for part in parts)
