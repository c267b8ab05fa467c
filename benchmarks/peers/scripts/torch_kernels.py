"""torch's own CPU kernels on one process, all cores: causal prefill by its flash operator, decode
by ``scaled_dot_product_attention`` as it is and with the query heads of a KV head as rows, and what
a matrix product reaches."""

from __future__ import annotations

from typing import Any

import child
import torch
from torch.nn.functional import scaled_dot_product_attention

MM = 2048  # rows and columns of the matrices


def flash(case: child.Case) -> Any:
    q, k, v = _inputs(case, case["tokens"])
    scale = case["dim"] ** -0.5
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return lambda: op(q, k, v, 0.0, True, scale=scale)


def sdpa(case: child.Case) -> Any:
    q, k, v = _inputs(case, 1)
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)


def grouped(case: child.Case) -> Any:
    q, k, v = _inputs(case, 1)
    rows = q.view(1, case["kv_heads"], -1, case["dim"])
    return lambda: scaled_dot_product_attention(rows, k, v)


def mm(case: child.Case) -> Any:
    a, b = (torch.randn(MM, MM).to(getattr(torch, case["dtype"])) for _ in range(2))
    return lambda: torch.mm(a, b)


def _inputs(case: child.Case, rows: int) -> list[Any]:
    torch.manual_seed(0)
    dtype, dim, tokens = getattr(torch, case["dtype"]), case["dim"], case["tokens"]
    shapes = (case["heads"], rows), (case["kv_heads"], tokens), (case["kv_heads"], tokens)
    return [torch.randn(1, heads, count, dim).to(dtype) for heads, count in shapes]


def start(options: child.Case) -> Any:
    torch.set_num_threads(options["threads"])
    make = {"flash": flash, "sdpa": sdpa, "grouped": grouped, "mm": mm}[options["way"]]

    @torch.inference_mode()
    def run(case: child.Case) -> child.Case:
        call = make(case)
        call()
        return {"seconds": child.timed(case["repeats"], call, lambda: None)}

    return run


if __name__ == "__main__":
    child.serve(start)
