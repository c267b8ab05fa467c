"""What flash-attn 2.x documents of its two functions, emulated in fp64 on a CPU.

Written from the package's README and the argument checks of its C++ entry (csrc/flash_attn,
flash_api.cpp), so that the adapter meets the same rules where no CUDA device is at hand:

- the last dimension is dense, at most 256 and a multiple of 8; KV heads divide query heads;
- masks are aligned to the bottom right: row i sits at key ``i + S - T``;
- a window side of S or more is "no limit" (-1), then a side without limit beside one with
  is set to S; ``causal`` sets the right side to 0 and means nothing for a single row;
- lse is a natural log, ``[B, H, T]``, and +inf for a row that sees nothing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ADAPTER = "ds_cp.attention.kernels.flash"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """``q [B, T, H, D]``, ``k, v [B, S, G, D]`` -> out as q, lse ``[B, H, T]`` fp32, None."""
    assert return_attn_probs and dropout_p == 0.0
    _check(q, k, v)
    seen = _visible(q.shape[1], k.shape[1], causal, *window_size)
    outs, lses = zip(
        *(_attend(*row, seen, softmax_scale, softcap) for row in zip(q, k, v, strict=True)),
        strict=True,
    )
    return torch.stack(outs), torch.stack(lses), None


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_softmax_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q [B, T, H, D]`` over the first ``cache_seqlens`` (``[B]`` int32) of ``[B, S, G, D]``."""
    assert return_softmax_lse and cache_seqlens is not None
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == q.shape[:1]
    _check(q, k_cache, v_cache)
    outs, lses = [], []
    for row, length in enumerate(cache_seqlens.tolist()):
        seen = _visible(q.shape[1], length, causal, *window_size)
        found = _attend(
            q[row], k_cache[row, :length], v_cache[row, :length], seen, softmax_scale, softcap
        )
        outs.append(found[0])
        lses.append(found[1])
    return torch.stack(outs), torch.stack(lses)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    assert q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    assert q.shape[0] == k.shape[0] and q.shape[1] and k.shape[1], "no rows or no keys"
    if q.shape[3] > 256 or q.shape[3] % 8 or q.shape[3] != k.shape[3]:
        raise RuntimeError(f"head dimension {q.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise RuntimeError(f"{q.shape[2]} query heads over {k.shape[2]}")
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        raise RuntimeError("Input tensor must have contiguous last dimension")


def _visible(rows: int, keys: int, causal: bool, left: int, right: int) -> torch.Tensor:
    """``[T, S]``, True where row i sees key j."""
    left = -1 if left >= keys else left
    right = -1 if right >= keys else right
    if causal and rows > 1:
        right = 0
    if left < 0 <= right:
        left = keys
    elif right < 0 <= left:
        right = keys
    at = torch.arange(rows)[:, None] + keys - rows
    key = torch.arange(keys)[None, :]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        seen &= key >= at - left
    if right >= 0:
        seen &= key <= at + right
    return seen


def _attend(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    fold = q_THD.shape[1] // k_SGD.shape[1]
    k, v = (x.double().repeat_interleave(fold, dim=1) for x in (k_SGD, v_SGD))
    scores = torch.einsum("thd,shd->hts", q_THD.double(), k)
    scores = scores * (q_THD.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("hts,shd->thd", torch.softmax(scores, dim=-1).nan_to_num(0.0), v)
    return out.to(q_THD.dtype), lse.masked_fill(torch.isneginf(lse), torch.inf).float()


def package(**names: Any) -> types.ModuleType:
    """A module called flash_attn that holds ``names``; without any, the emulation."""
    found = types.ModuleType("flash_attn")
    found.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    found.__dict__.update(
        names
        or {
            "flash_attn_func": flash_attn_func,
            "flash_attn_with_kvcache": flash_attn_with_kvcache,
        }
    )
    return found


@contextmanager
def installed(module: types.ModuleType) -> Iterator[None]:
    """``module`` is what ``import flash_attn`` gives, and the adapter is imported anew."""
    kept = {name: sys.modules.pop(name, None) for name in ("flash_attn", ADAPTER)}
    sys.modules["flash_attn"] = module
    try:
        yield
    finally:
        for name, found in kept.items():
            sys.modules.pop(name, None)
            if found is not None:
                sys.modules[name] = found


@contextmanager
def emulated() -> Iterator[Any]:
    """The adapter's module over the emulation."""
    with installed(package()):
        yield importlib.import_module(ADAPTER)
