"""Triton: RMS norms of which a row does not depend on the number of rows: one program a row, whose
sum is the same tree each time. torch's reduction on CUDA cuts a row by how many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


class TritonNorm:
    """``x / sqrt(mean(x^2) + eps) * w`` over the last dim: ``[..., N]`` -> ``[..., N]``. Arguments
    as of ``NativeNorm``; so is what goes to the module's ``own`` function."""

    row_invariant = True

    def __init__(
        self, weight: torch.Tensor, eps: float, round_first: bool, add_one: bool,
        own: Callable[..., Any],
    ) -> None:  # fmt: skip
        self._weight = weight.detach().float() + (1.0 if add_one else 0.0)
        self._dtype, self._eps, self._round_first, self._own = weight.dtype, eps, round_first, own

    def __call__(self, *given: Any, **named: Any) -> Any:
        if len(given) != 1 or named:
            return self._own(*given, **named)
        x, n = given[0], len(self._weight)
        if x.shape[-1:] != (n,) or x.dtype != self._dtype or x.device != self._weight.device:
            return self._own(x)
        x = x.contiguous()
        if x.data_ptr() % 16:  # or Triton would compile the kernel once more for it
            x = x.clone()
        y = torch.empty_like(x)
        if rows := x.numel() // n:
            norm_kernel[(rows,)](
                x, self._weight, y, n, self._eps,
                ROUND=self._round_first, N=triton.next_power_of_2(n), num_warps=warps(n),
            )  # fmt: skip
        return y


def warps(n: int) -> int:
    """Of the program of a row of ``n`` elements, whatever rows there are: the tree of its sum
    follows from it."""
    return max(1, min(8, int(triton.next_power_of_2(n)) // 512))


@triton.jit
def norm_kernel(x, weight, y, n, eps, ROUND: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n
    at = tl.arange(0, N)
    there = at < n
    values = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, 0) / n
    values = values * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    if ROUND:
        values = values.to(y.dtype.element_ty).to(tl.float32)
    values = values * tl.load(weight + at, mask=there, other=0.0)
    tl.store(y + row + at, values.to(y.dtype.element_ty), mask=there)
