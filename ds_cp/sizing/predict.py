"""TTFT and TPOT of each mode, by the engine's own cost model."""

from __future__ import annotations

from dataclasses import dataclass

from ds_cp.cost import CostModel, Passing, Sums
from ds_cp.sizing.device import Device, Link
from ds_cp.sizing.job import CHUNK, Job, counts
from ds_cp.sizing.layers import LayerShape
from ds_cp.sizing.model import ModelShape

MODES: dict[Passing, str] = {
    "local": "local",
    "kv": "ring, pass-KV",
    "q": "ring, pass-Q",
    "tree": "tree",
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one request alone: ``ttft_s`` of a prompt of the job's context, ``tpot_s`` of each
    further token behind it. ``ranks``: that work on it, ``tp`` groups and all."""

    mode: Passing
    ranks: int
    ttft_s: float
    tpot_s: float


def cost_model(model: ModelShape, device: Device, job: Job, groups: int) -> CostModel:
    """The cost model of a request over ``groups`` of the job's groups of ``tp`` ranks, which fill
    one host after another. ``ConfigError`` where the device has no rates for the dtype."""
    rates, memory = device.rates_of(job.dtype), device.memory
    spans_hosts = groups > job.cp_per_host
    link = device.links.inter_host if spans_hosts else device.links.intra_host
    near = device.links.intra_host
    heads, kv_heads, dim = _mean_shape(model.layers, job.tp)
    inside = near if job.tp > 1 else None
    windows: dict[int, int] = {}
    for layer in model.layers:
        if layer.window:
            windows[layer.window] = windows.get(layer.window, 0) + 1
    return CostModel(
        flops_per_s=rates.linear_tflops * 1e12,
        bytes_per_s=link.gb_per_s * 1e9,
        latency_s=link.latency_us * 1e-6,
        num_layers=len(model.layers),
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        weights=model.active_of_rank(job.tp),
        element=job.element,
        windows=tuple(sorted(windows.items())),
        in_background=link.in_background,
        attention_flops_per_s=rates.attention_tflops * 1e12,
        memory_bytes_per_s=memory.gb_per_s * 1e9,
        kv_bytes_per_s=memory.kv_gb_per_s * 1e9 if memory.kv_gb_per_s else None,
        layer_s=device.layer_us * 1e-6,
        step_s=device.step_us * 1e-6,
        hop_s=device.hop_us * 1e-6,
        head=model.head_size,
        stored=sum(layer.of_rank(job.tp) for layer in model.layers),
        near_latency_s=near.latency_us * 1e-6 if spans_hosts and job.cp_per_host > 1 else None,
        sums=_sums(model, job, inside) if inside else None,
    )


def predict(model: ModelShape, device: Device, job: Job, chunk: int = CHUNK) -> list[Prediction]:
    """Every mode over 1, 2, 4, ... groups of ranks up to the job's; the prompt in steps of at most
    ``chunk`` tokens a group."""
    found = []
    for groups in counts(job.cp):
        cost = cost_model(model, device, job, groups)
        modes: list[Passing] = ["local"] if groups == 1 else ["kv", "q", "tree"]
        for mode in modes:
            ttft = cost.chunks_s(mode, groups, job.context, 0, chunk * groups)
            tpot = cost.forward_s(mode, groups, 1, job.context)
            found.append(Prediction(mode, groups * job.tp, ttft, tpot))
    return found


def _sums(model: ModelShape, job: Job, link: Link) -> Sums:
    """Attention's output and the feed-forward part's, of each layer."""
    return Sums(job.tp, 2, model.hidden, link.gb_per_s * 1e9, link.latency_us * 1e-6)


def _mean_shape(layers: tuple[LayerShape, ...], tp: int) -> tuple[int, int, int]:
    """Query heads, KV heads and dim of the mean layer, as ``ds_cp.startup.shapes`` rounds them."""
    count = len(layers)
    heads = sum(each.num_q_heads // tp for each in layers) / count
    dims = [each.head_dim + each.v_dim for each in layers]
    work = sum(each.num_q_heads // tp * d for each, d in zip(layers, dims, strict=True)) / count
    kept = sum(each.num_kv_heads // tp * d for each, d in zip(layers, dims, strict=True)) / count
    dim = work / (2.0 * heads)
    return round(heads), max(1, round(kept / (2.0 * dim))), max(1, round(dim))
