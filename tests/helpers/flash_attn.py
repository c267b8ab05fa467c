"""What flash-attn 2, 3 and 4 document of ``flash_attn_func``, emulated in fp64 on a CPU.

Written from the packages' READMEs and signatures, and for 2 the argument checks of its C++ entry
(csrc/flash_attn, flash_api.cpp), so that the adapters meet the same rules where no CUDA device is
at hand:

- the last dimension is dense, at most 256 and a multiple of 8; KV heads divide query heads; 16 bit;
- masks are aligned to the bottom right: row i sits at key ``i + S - T``;
- lse is a natural log, ``[B, H, T]``, and +inf for a row that sees nothing;
- 2 gives ``(out, lse, None)`` with return_attn_probs, else out alone; 3 gave ``(out, lse)``
  always, then out alone, and since August 2025 ``(out, lse)`` with return_attn_probs; 4 gives
  ``(out, lse)`` always, with an lse of None unless return_lse asks for it.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAMES = (
    "flash_attn", "flash_attn.cute", "flash_attn_interface", "flash_attn_3",
    "flash_attn_3.flash_attn_interface",
)  # fmt: skip


def fa2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn 2: ``q [B, T, H, D]``, ``k, v [B, S, G, D]``."""
    out, lse = _forward(q, k, v, softmax_scale, causal)
    return (out, lse, None) if return_attn_probs else out


def fa3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn 3 since August 2025."""
    out, lse = _forward(q, k, v, softmax_scale, causal)
    return (out, lse) if return_attn_probs else out


def fa3_first(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Any:
    """The first flash-attn 3."""
    return _forward(q, k, v, softmax_scale, causal)


def fa3_between(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Any:
    """flash-attn 3 of mid 2025, from which nobody gets an lse."""
    return _forward(q, k, v, softmax_scale, causal)[0]


def fa4(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """flash-attn 4."""
    out, lse = _forward(q, k, v, softmax_scale, causal)
    return out, lse if return_lse else None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v)
    seen = _visible(q.shape[1], k.shape[1], causal)
    rows = [_attend(*row, seen, scale) for row in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    assert q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    assert q.shape[0] == k.shape[0] and q.shape[1] and k.shape[1], "no rows or no keys"
    if q.shape[3] > 256 or q.shape[3] % 8 or q.shape[3] != k.shape[3]:
        raise RuntimeError(f"head dimension {q.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise RuntimeError(f"{q.shape[2]} query heads over {k.shape[2]}")
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        raise RuntimeError("Input tensor must have contiguous last dimension")


def _visible(rows: int, keys: int, causal: bool) -> torch.Tensor:
    """``[T, S]``, True where row i sees key j."""
    seen = torch.ones(rows, keys, dtype=torch.bool)
    return seen.tril(keys - rows) if causal else seen


def _attend(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    fold = q_THD.shape[1] // k_SGD.shape[1]
    k, v = (x.double().repeat_interleave(fold, dim=1) for x in (k_SGD, v_SGD))
    scores = torch.einsum("thd,shd->hts", q_THD.double(), k)
    scores = scores * (q_THD.shape[2] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("hts,shd->thd", torch.softmax(scores, dim=-1).nan_to_num(0.0), v)
    return out.to(q_THD.dtype), lse.masked_fill(torch.isneginf(lse), torch.inf).float()


def package(
    name: str, function: Callable[..., Any] | None = None, **names: Any
) -> types.ModuleType:
    """A module called ``name`` that holds ``function`` as flash_attn_func, and ``names``."""
    found = types.ModuleType(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None)
    found.__file__ = f"{name}/__init__.py"
    found.__path__ = []
    found.__dict__.update(names if function is None else {"flash_attn_func": function, **names})
    return found


@contextmanager
def installed(*modules: types.ModuleType) -> Iterator[None]:
    """These modules, and of ``NAMES`` no others, are what ``import`` finds."""
    kept = {name: sys.modules.pop(name, None) for name in NAMES}
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in kept.items() if module is not None})
