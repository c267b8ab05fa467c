"""Published figures of context parallelism, and the machine that they are of.

"Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783v3: Llama 3 405B, eight
H100 (96 GB HBM2e, 2.4 TB/s, 500 W) a host, tensor parallelism over the eight, context parallelism
(CP) over hosts; feed-forward weights in FP8, the rest and KV in bf16. Batch 1. Rows of tensor
parallelism over hosts (TP16, TP32) are left out: ds_cp keeps it within a host. So are table 8's of
a batch of 4. No other figure of tables 4 to 8 is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ds_cp.cost import CostModel, Passing
from ds_cp.sizing.device import read_device
from ds_cp.sizing.job import Job
from ds_cp.sizing.model import ModelShape, shape_of
from ds_cp.sizing.predict import cost_model

K = 1024
LLAMA_405B: dict[str, object] = {
    "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
TP = 8

# table, tokens, CP ranks (hosts) -> seconds
PREFILL = [
    ("6", 8 * K, 1, 1.740), ("6", 32 * K, 1, 7.658), ("6", 128 * K, 1, 42.010),
    ("6", 8 * K, 2, 0.999), ("6", 32 * K, 2, 4.015), ("6", 128 * K, 2, 21.042),
    ("7", 128 * K, 4, 10.950), ("text", 128 * K, 8, 5.850), ("text", 128 * K, 16, 3.800),
    ("text", K * K, 16, 77.0),
]  # fmt: skip
# the same for a token of a decode, ring pass-Q where there are several hosts
DECODE = [
    ("6", 8 * K, 1, 0.04451), ("6", 32 * K, 1, 0.04464), ("6", 128 * K, 1, 0.04626),
    ("6", 8 * K, 2, 0.06561), ("6", 32 * K, 2, 0.06566), ("6", 128 * K, 2, 0.06663),
    ("7", 128 * K, 2, 0.06023), ("7", 128 * K, 4, 0.07131),
]  # fmt: skip
# table 8: CP ranks -> microseconds of a layer's attention with all exchanges, 128K stored tokens
DECODE_LAYER = [(1, 38.9), (2, 157.7), (4, 238.6)]
# table 4, CP4, 128,000 tokens in all: miss rate in percent -> milliseconds by pass-KV, pass-Q
PARTIAL = [
    (1.0, 1023.39, 898.71), (2.5, 1110.18, 1046.43), (3.25, 1298.92, 1280.1),
    (5.0, 1305.56, 1302.01), (10.0, 2080.67, 2205.27), (20.0, 3353.02, 3617.02),
    (30.0, 4629.23, 4922.52), (40.0, 5745.08, 6217.83), (50.0, 6845.21, 7367.99),
    (60.0, 7890.35, 8468.66), (70.0, 8697.27, 9666.62), (80.0, 10105.78, 10652.39),
    (90.0, 11136.4, 11571.62), (100.0, 11462.15, 12360.57),
]  # fmt: skip
# table 5, CP4: miss rate in percent -> microseconds of a hop's KV, of a hop's attention, of a hop's
# queries, of the exchange that brings partials back
HOPS = [(2.5, 627, 414, 166, 424), (10.0, 631, 1608, 544, 1023)]


class Row(NamedTuple):
    """One figure, in seconds. ``fit``: a rate was fitted to it, so it says nothing."""

    table: str
    what: str
    published: float
    calibrated: float
    shipped: float
    fit: bool = False


def llama() -> ModelShape:
    """Llama 3 405B."""
    return shape_of(LLAMA_405B, "llama-3-405b", "config.json")


def shipped(hosts: int) -> CostModel:
    """The cost model that ``ds-cp plan --device h100`` uses, in bf16 throughout."""
    job = Job(hosts, TP, 128 * K, "bf16", TP)
    return cost_model(llama(), read_device("h100"), job, hosts)


def calibrated(hosts: int) -> CostModel:
    """The same with the rates of the paper's own machine, and numbers that are fitted to one row
    each, in all four: here the rate of linear layers with their sums (8K on one host) and what a
    ring hop takes beside its bytes (128K on 16 hosts); in ``decoding`` the fixed part of a layer
    (8K on one host); in ``partial`` a constant of its path (1 % new, pass-KV). A fifth row, the
    first of table 8, gives the rate of memory, and counts as fitted too.

    Given: attention 540 TFLOP/s (FlashAttention-3 alone, section 4.2), links 26.1 GB/s (table 5, KV
    of a hop) and 56.7 us (table 8, CP2: the mean of SendRecv, 32.3 us, and All2All, 81.1 us),
    memory 1.69 TB/s (table 8, 65.5 MB of KV in 38.9 us). Weights count as bf16 of as many
    bytes as they have, FP8 as a half.
    """
    shape = llama()
    feed_forward = 3 * 16384 * 53248 * 126
    per_rank = (sum(layer.total for layer in shape.layers) - feed_forward // 2) // TP
    base = replace(
        shipped(hosts), attention_flops_per_s=540e12, bytes_per_s=26.1e9, latency_s=56.7e-6,
        memory_bytes_per_s=65.536e6 / 38.9e-6, kv_bytes_per_s=None,
        weights=per_rank, stored=per_rank, sums=None,
        head=shape.head_size // TP, layer_s=0.0, hop_s=0.0,
    )  # fmt: skip
    free = float("inf")
    alone = replace(base, flops_per_s=free, memory_bytes_per_s=free)
    linear_s = 1.740 - alone.forward_s("local", 1, 8 * K, 0)
    fitted = replace(base, flops_per_s=2.0 * per_rank * 8 * K / linear_s)
    far = fitted.forward_s("kv", 16, 128 * K, 0)
    return replace(fitted, hop_s=(3.800 - far) / (126 * 15))


def decoding(cost: CostModel) -> CostModel:
    """The calibrated model of a decode step: its layers have a fixed part."""
    left = 0.04451 - cost.forward_s("local", 1, 1, 8 * K)
    return replace(cost, layer_s=left / cost.num_layers, hop_s=0.0)


def rows() -> list[Row]:
    """Every figure beside both predictions."""
    found = []
    for table, tokens, hosts, seconds in PREFILL:
        mode: Passing = "local" if hosts == 1 else "kv"
        ours, plain = (
            cost(hosts).forward_s(mode, hosts, tokens, 0) for cost in (calibrated, shipped)
        )
        fit = (tokens, hosts) in ((8 * K, 1), (128 * K, 16))
        what = f"TTFT, {tokens // K}K tokens, CP{hosts}"
        found.append(Row(table, what, seconds, ours, plain, fit))
    for table, tokens, hosts, seconds in DECODE:
        mode = "local" if hosts == 1 else "q"
        ours = decoding(calibrated(hosts)).forward_s(mode, hosts, 1, tokens)
        plain = shipped(hosts).forward_s(mode, hosts, 1, tokens)
        fit = (tokens, hosts) == (8 * K, 1)
        what = f"TTIT, {tokens // K}K tokens, CP{hosts}"
        found.append(Row(table, what, seconds, ours, plain, fit))
    for hosts, micro in DECODE_LAYER:
        mode = "local" if hosts == 1 else "q"
        ours, plain = (_attention_layer(cost(hosts), mode, hosts) for cost in (calibrated, shipped))
        what = f"attention of a decode layer with exchanges, 128K tokens, CP{hosts}"
        found.append(Row("8", what, micro * 1e-6, ours, plain, hosts == 1))
    return found + partial()


def _attention_layer(cost: CostModel, mode: Passing, hosts: int) -> float:
    bare = replace(cost, layer_s=0.0, sums=None, hop_s=0.0)
    whole = bare.forward_s(mode, hosts, 1, 128 * K)
    return (whole - replace(bare, num_q_heads=0, num_kv_heads=0).forward_s("local", 1, 1, 0)) / 126


def partial() -> list[Row]:
    """Table 4. Its path takes longer by a constant than that of tables 6 and 7, which is fitted to
    its first row, where it shows most."""
    found = []
    extra = PARTIAL[0][1] / 1e3 - calibrated(4).forward_s("kv", 4, 1280, 128_000 - 1280)
    for miss, kv, q in PARTIAL:
        new = round(128_000 * miss / 100)
        both: tuple[tuple[Passing, str, float], ...] = (("kv", "KV", kv), ("q", "Q", q))
        for mode, name, milli in both:
            ours = calibrated(4).forward_s(mode, 4, new, 128_000 - new) + extra
            plain = shipped(4).forward_s(mode, 4, new, 128_000 - new)
            fit = miss == 1.0 and mode == "kv"
            what = f"TTFT, {miss:g} % of 128,000 tokens new, CP4, pass-{name}"
            found.append(Row("4", what, milli / 1e3, ours, plain, fit))
    return found


def choices() -> list[dict[str, Any]]:
    """Table 4's faster kind beside the predicted one, and what a wrong choice would cost there."""
    found = []
    for miss, kv, q in PARTIAL:
        new = round(128_000 * miss / 100)
        row: dict[str, Any] = {"miss_percent": miss, "published": "kv" if kv <= q else "q"}
        for name, cost in (("calibrated", calibrated(4)), ("shipped", shipped(4))):
            ours = {m: cost.forward_s(m, 4, new, 128_000 - new) for m in _KINDS}
            picked = min(_KINDS, key=lambda m, ours=ours: ours[m])  # type: ignore[misc]
            regret = (kv if picked == "kv" else q) / min(kv, q) - 1
            row |= {name: picked, f"{name}_regret": regret}
        found.append(row)
    return found


_KINDS: tuple[Passing, ...] = ("kv", "q")
