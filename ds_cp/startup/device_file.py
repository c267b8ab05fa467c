"""A device file of this machine, from what ``rates`` measured."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ds_cp.comm.links import LARGE, SMALL, LinkSpeed
from ds_cp.config import Config
from ds_cp.sizing.device import Device
from ds_cp.sizing.memory import GIB
from ds_cp.startup.join import join_job
from ds_cp.startup.kv_budget import AUTO_GPU_SHARE, AUTO_MEMORY_SHARE
from ds_cp.startup.rates import KEYS, READ_KEYS, STEPS, TRIALS, Rates, measure_rates
from ds_cp.topology.job import Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure_device(job: Job, config: Config, name: str) -> dict[str, Any] | None:
    """Join the job of two ranks or more and measure it in ``config.dtype``: the object of a device
    file on rank 0, None on the others. Collective; ``CommError`` when a rank does not come."""
    world, threads = join_job(job, config)
    try:
        rates = measure_rates(world, DTYPES[config.dtype])
        if world.rank != 0:
            return None
        kind = world.device.type
        what = torch.cuda.get_device_name(world.device) if kind == "cuda" else "CPU"
        about = f"{what}, {job.world_size} ranks of {threads} threads, {platform.machine()}"
        return device_of(rates, name, about, kind, config.dtype, job.world_size)
    finally:
        world.leave()


def device_of(
    rates: Rates, name: str, about: str, kind: str, dtype: str, ranks: int
) -> dict[str, Any]:
    """The object of a device file. ``about``: the machine in words; ``kind``: cpu or cuda;
    ``dtype``: as the config names it; ``ranks``: that computed at once. Checked against the schema
    of device files."""
    measured = f"measured by ds-cp bench comm, {ranks} ranks at once, fastest of {TRIALS}"
    near = next((x for x in rates.links if x.name.startswith("within")), None)
    far = next((x for x in rates.links if x.name.startswith("between")), None)
    one = near or far
    assert one is not None, "two ranks or more have a link"
    sources = {
        f"rates.{dtype}.linear_tflops": measured,
        f"rates.{dtype}.attention_tflops": f"{measured}, causal over {KEYS[kind]} tokens",
        "memory.gib": "free for a rank when it was measured",
        "memory.reserved_gib": "none: what others use is not in memory.gib",
        "memory.kv_share": "what the server takes where kv_cache says auto",
        "memory.gb_per_s": f"{measured}, weights that one row passes",
        "memory.kv_gb_per_s": f"{measured}, one row over {READ_KEYS[kind]} tokens",
        "layer_us": f"{measured[: measured.rindex(',')]}, fastest of {STEPS} decode steps of a "
        "decoder without work",
        "step_us": "the same without its layers; scheduler and sampler are not in",
    }
    links = {}
    for key, link, other in (("intra_host", near, far), ("inter_host", far, near)):
        links[key] = _link(link or one)
        how = f"{measured}, {SMALL} and {LARGE} bytes one way"
        if link is None:
            assert other is not None
            how = f"not measured: as {other.name}"
        sources |= {f"links.{key}.gb_per_s": how, f"links.{key}.latency_us": how}
    found: dict[str, Any] = {
        "name": name,
        "description": about[:400],
        "rates": {
            dtype: {
                "linear_tflops": _round(rates.linear / 1e12),
                "attention_tflops": _round(rates.attention / 1e12),
            }
        },
        "memory": {
            "gib": _round(rates.memory / GIB),
            "reserved_gib": 0.0,
            "kv_share": AUTO_GPU_SHARE if kind == "cuda" else AUTO_MEMORY_SHARE,
            "gb_per_s": _round(rates.reading / 1e9),
            "kv_gb_per_s": _round(rates.reading_kv / 1e9),
        },
        "layer_us": _round(rates.layer_s * 1e6),
        "step_us": _round(rates.step_s * 1e6),
        "links": links,
        "sources": sources,
    }
    if rates.host:
        found["memory"]["host_gb_per_s"] = _round(rates.host / 1e9)
        sources["memory.host_gb_per_s"] = f"{measured}, blocks of KV there and back"
    Device.model_validate(found)
    return found


def _link(link: LinkSpeed) -> dict[str, Any]:
    return {
        "gb_per_s": _round(link.gb_per_s),
        "latency_us": _round(link.latency_us),
        "in_background": link.in_background,
    }


def _round(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
