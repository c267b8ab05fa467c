"""Decode attention over gloo ranks by ring-attention-pytorch's ``tree_attn_decode``.

It has no grouped queries, so it gets the keys expanded to all query heads, as it wants them; the
expansion is not timed. Queries are on all ranks already, where ds_cp sends them.
"""

from __future__ import annotations

import os
from typing import Any

import child
import torch


def start(options: child.Case) -> Any:
    dist = child.join(options["threads"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    from ring_attention_pytorch.tree_attn_decoding import tree_attn_decode

    @torch.inference_mode()
    def run(case: child.Case) -> child.Case:
        tokens, dim, group = case["tokens"], case["dim"], case["heads"] // case["kv_heads"]
        dtype = getattr(torch, case["dtype"])
        torch.manual_seed(0)
        heads = (case["heads"], case["kv_heads"], case["kv_heads"])
        q, k, v = (torch.randn(tokens, n, dim).to(dtype).transpose(0, 1) for n in heads)
        q = q[None, :, -1:].contiguous()
        part = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks)
        mine = [x[:, part].repeat_interleave(group, 0)[None].contiguous() for x in (k, v)]

        def attend() -> Any:
            return tree_attn_decode(q, *mine, shard_kv_seq=False)

        told = {}
        if case.get("check"):
            want = torch.nn.functional.scaled_dot_product_attention(
                q.double(), k[None].double(), v[None].double(), enable_gqa=True
            )
            told["max_error"] = float((attend().double() - want).abs().max())
        return {"seconds": child.timed(case["repeats"], attend, dist.barrier), **told}

    return run


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    child.serve(start)
