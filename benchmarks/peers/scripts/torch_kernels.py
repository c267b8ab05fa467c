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
    shapes = (rows, case["heads"]), (tokens, case["kv_heads"]), (tokens, case["kv_heads"])
    drawn = [torch.randn(1, *shape, dim).to(dtype) for shape in shapes]  # as ds_cp's
    return [x.transpose(1, 2).contiguous() for x in drawn]


def error_of_flash(case: child.Case) -> float:
    """Largest difference to plain attention in fp64."""
    got = flash(case)()[0].double()
    want = scaled_dot_product_attention(
        *(x.double() for x in _inputs(case, case["tokens"])), is_causal=True, enable_gqa=True
    )
    return float((got - want).abs().max())


def start(options: child.Case) -> Any:
    torch.set_num_threads(options["threads"])
    make = {"flash": flash, "sdpa": sdpa, "grouped": grouped, "mm": mm}[options["way"]]

    @torch.inference_mode()
    def run(case: child.Case) -> child.Case:
        call = make(case)
        call()
        checked = options["way"] == "flash" and case.get("check")
        told = {"max_error": error_of_flash(case)} if checked else {}
        return {"seconds": child.timed(case["repeats"], call, lambda: None), **told}

    return run


if __name__ == "__main__":
    child.serve(start)
