"""Triton: a linear layer whose rows do not depend on the number of rows.

A row's sum over K goes in steps of the same length from 0 on, in one program, whatever rows are
beside it: tiles are the same for every number of rows, and K is never split over programs. cuBLAS
takes another product for other numbers of rows, which sums in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 64  # of one program's tile
STEP_BYTES = 128  # of a row, in one step of its sum
STAGES = 4  # steps that are on their way at once
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonLinear:
    """``x W^T + b``: ``[..., K]`` -> ``[..., N]``, summed in fp32 and rounded once. Takes the place
    of a module's ``forward``, and reads the module's weights as they are then.

    ``interpreted``: on a CPU, for tests; Triton's interpreter cannot multiply bf16. Raises
    ``ValueError`` for an input of another width, dtype or device than the weights."""

    row_invariant = True

    def __init__(self, module: torch.nn.Linear, interpreted: bool = False) -> None:
        self._module = module
        self._upcast = interpreted

    def check(self) -> None:
        """Compile and run it once, for one row. Raises whatever Triton's compiler, the linker or
        the driver does."""
        weight = self._module.weight
        self(weight.new_zeros(1, weight.shape[1]))
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # named as that of nn.Linear
        weight, bias = self._module.weight, self._module.bias
        num_columns, depth = weight.shape
        fits = input.shape[-1:] == (depth,) and input.dtype == weight.dtype
        if not fits or input.device != weight.device:
            raise ValueError(
                f"a linear layer of {depth} columns, {weight.dtype} on {weight.device}, got "
                f"{list(input.shape)}, {input.dtype} on {input.device}"
            )
        rows = input.reshape(-1, depth).contiguous()
        if rows.data_ptr() % 16:  # or Triton would compile the kernel once more for it
            rows = rows.clone()
        y = torch.empty(len(rows), num_columns, dtype=rows.dtype, device=rows.device)
        if len(rows):
            linear_kernel[(triton.cdiv(num_columns, COLUMNS), triton.cdiv(len(rows), ROWS))](
                rows, weight, weight if bias is None else bias, y,
                len(rows), num_columns, depth,
                BIAS=bias is not None, M=ROWS, N=COLUMNS, K=STEP_BYTES // weight.dtype.itemsize,
                UPCAST=self._upcast, num_warps=4, num_stages=STAGES,
            )  # fmt: skip
        return y.view(*input.shape[:-1], num_columns)


# One program for any number of rows: what is known of it is no part of what is compiled.
@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x, weight, bias, y, num_rows, num_columns, depth,
    BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    live, there = row < num_rows, column < num_columns
    acc = tl.zeros((M, N), dtype=tl.float32)
    for k0 in range(0, depth, K):
        k = k0 + tl.arange(0, K)
        x_at = x + row[:, None] * depth + k[None, :]
        a = tl.load(x_at, mask=live[:, None] & (k < depth)[None, :], other=0.0)
        w_at = weight + column[:, None] * depth + k[None, :]
        b = tl.load(w_at, mask=there[:, None] & (k < depth)[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    y_at = y + row[:, None] * num_columns + column[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=live[:, None] & there[None, :])
