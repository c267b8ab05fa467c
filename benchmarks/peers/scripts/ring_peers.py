"""Causal prefill attention over gloo ranks by a published ring: ring-flash-attn, yunchang, or the
ring in torch's own context parallelism.

None of them has a CPU kernel, so all get torch's own: its flash attention for CPU, which is what
they would find there.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import child
import torch

H, G = "heads", "kv_heads"


def cpu_flash(q: Any, k: Any, v: Any, causal: bool, scale: float) -> tuple[Any, Any]:
    """``[1, H, T, D]`` -> the output, of the same shape, and its lse ``[1, H, T]``."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )


def flash_attn_forward(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
) -> tuple[Any, Any, None, None]:
    """flash-attn's own forward call, ``[1, T, H, D]``, on a CPU."""
    out, lse = cpu_flash(*(x.transpose(1, 2) for x in (q, k, v)), causal, softmax_scale)
    return out.transpose(1, 2), lse, None, None


def ring_flash_attn(group: Any) -> Any:
    """Its zigzag ring, with a module of that one function in the place of flash-attn."""
    package, interface = types.ModuleType("flash_attn"), types.ModuleType("interface")
    interface._flash_attn_forward = flash_attn_forward  # type: ignore[attr-defined]
    for name in ("backward", "varlen_forward", "varlen_backward"):  # imported, never called
        setattr(interface, f"_flash_attn_{name}", None)
    sys.modules["flash_attn"] = package
    sys.modules["flash_attn.flash_attn_interface"] = interface
    adapters = types.ModuleType("ring_flash_attn.adapters")  # for a transformers of long ago
    adapters.substitute_hf_flash_attn = None  # type: ignore[attr-defined]
    adapters.update_ring_flash_attn_params = None  # type: ignore[attr-defined]
    sys.modules["ring_flash_attn.adapters"] = adapters
    from ring_flash_attn import zigzag_ring_flash_attn_func

    def attend(q: Any, k: Any, v: Any) -> Any:
        return zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group)

    return attend


def yunchang(group: Any) -> Any:
    """Its zigzag ring over the operator that it calls for torch's flash attention."""
    from yunchang.kernels import AttnType, attention
    from yunchang.ring import zigzag_ring_flash_attn_func

    def op(q: Any, k: Any, v: Any, dropout_p: float, is_causal: bool, scale: float) -> Any:
        return cpu_flash(q, k, v, is_causal, scale)

    attention._scaled_dot_product_flash_attention = op

    def attend(q: Any, k: Any, v: Any) -> Any:
        return zigzag_ring_flash_attn_func(
            q, k, v, causal=True, group=group, attn_type=AttnType.TORCH_FLASH
        )

    return attend


def torch_ring(group: Any) -> Any:
    """The ring that torch's context parallelism runs, heads first and balanced over ranks."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    ring._cp_options.rotate_method = ring._RotateMethod.ALL_TO_ALL

    def op(q: Any, k: Any, v: Any, is_causal: bool, scale: float) -> Any:
        return cpu_flash(q, k, v, is_causal, scale)

    def attend(q: Any, k: Any, v: Any) -> Any:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = ring._templated_ring_attention(
            group, 2, op, *heads_first, is_causal=True, scale=q.shape[-1] ** -0.5
        )[0]
        return out.transpose(1, 2)

    return attend


def start(options: child.Case) -> Any:
    dist = child.join(options["threads"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    makers = {"ring-flash-attn": ring_flash_attn, "yunchang": yunchang, "torch": torch_ring}
    attend = makers[options["peer"]](dist.group.WORLD)

    @torch.inference_mode()
    def run(case: child.Case) -> child.Case:
        tokens, dim = case["tokens"], case["dim"]
        dtype = getattr(torch, case["dtype"])
        torch.manual_seed(0)
        whole = [torch.randn(1, tokens, n, dim).to(dtype) for n in (case[H], case[G], case[G])]
        rows = torch.cat(
            [torch.arange(a, b) for a, b in child.share_of_zigzag(rank, ranks, tokens)]
        )
        mine = [x[:, rows].contiguous() for x in whole]
        told = {}
        if case.get("check"):
            q, k, v = (x.transpose(1, 2).double() for x in whole)
            want = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            got = attend(*mine).double()
            told["max_error"] = float((got - want.transpose(1, 2)[:, rows]).abs().max())
        seconds = child.timed(case["repeats"], lambda: attend(*mine), dist.barrier)
        return {"seconds": seconds, **told}

    return run


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    child.serve(start)
