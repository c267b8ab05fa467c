"""What ``ds-cp plan`` says: lines of text with bars, and the same as plain data for JSON."""

from __future__ import annotations

from typing import Any

from ds_cp.sizing.device import Device
from ds_cp.sizing.job import BLOCK, CHUNK, Job
from ds_cp.sizing.memory import GIB, host_room, largest_context, memory_of
from ds_cp.sizing.model import ModelShape
from ds_cp.sizing.predict import MODES, Prediction, predict

WIDTH = 50  # characters of a bar
PARTS = (("weights", "#"), ("kv", "="), ("activations", "+"), ("free", "."))


def sizing(model: ModelShape, device: Device, job: Job) -> dict[str, Any]:
    """Everything that is said, as plain data: the object of ``--json``. Sizes in bytes, times in
    seconds, lengths in tokens."""
    job.check(model)
    memory = memory_of(model, device, job)
    kv_token = model.kv_bytes(job.element, job.tp)
    return {
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "parameters": model.total,
            "active_parameters": model.active,
            "parameters_per_rank": model.of_rank(job.tp),
            "layers": len(model.layers),
            "windowed_layers": sum(1 for layer in model.layers if layer.window),
            "max_model_len": model.max_len,
            "kv_bytes_per_token_and_rank": kv_token,
        },
        "device": {"name": device.name, "description": device.description},
        "job": {
            "hosts": job.hosts,
            "ranks_per_host": job.ranks_per_host,
            "context": job.context,
            "dtype": job.dtype,
            "tp": job.tp,
            "cp": job.cp,
        },
        "memory_per_rank": {
            "total": memory.total,
            "reserved": memory.reserved,
            "weights": memory.weights,
            "kv": memory.kv,
            "activations": memory.activations,
            "free": memory.free,
            "kv_room": memory.kv_room,
            "fits": memory.fits,
        },
        "largest_context": [
            {"ranks": ranks, "tokens": tokens}
            for ranks, tokens in largest_context(model, device, job)
        ],
        "host_memory": _host(model, device, job),
        "predictions": [
            _prediction(each, model, device, job) for each in predict(model, device, job)
        ],
        "assumptions": assumptions(model, device, job),
    }


def _host(model: ModelShape, device: Device, job: Job) -> dict[str, Any]:
    room = host_room(model, device, job)
    return {"per_rank": job.host_memory, "tokens": room.tokens, "back_s": room.back_s}


def _prediction(one: Prediction, model: ModelShape, device: Device, job: Job) -> dict[str, Any]:
    room = dict(largest_context(model, device, job))[one.ranks]
    return {
        "mode": one.mode,
        "ranks": one.ranks,
        "ttft_s": one.ttft_s,
        "tpot_s": one.tpot_s,
        "holds_context": room >= job.context,
    }


def assumptions(model: ModelShape, device: Device, job: Job) -> list[str]:
    """What the numbers stand on, a sentence each."""
    rates = device.rates_of(job.dtype)
    near, far = device.links.intra_host, device.links.inter_host
    said = [
        "one request alone; its prompt is the whole context, in steps of at most "
        f"{CHUNK} tokens for each of the ranks that share it; blocks of {BLOCK} tokens, dealt out "
        "evenly; a decode step computes one token on one group of ranks",
        f"{device.name}: linear layers {rates.linear_tflops:g} TFLOP/s, attention "
        f"{rates.attention_tflops:g} TFLOP/s, weights read at {device.memory.gb_per_s:g} GB/s, "
        f"KV at {device.memory.kv_gb_per_s or device.memory.gb_per_s:g} GB/s, "
        f"beside that {device.layer_us:g} us a layer, {device.step_us:g} us a step and "
        f"{device.hop_us:g} us a ring hop",
        f"links: inside a host {near.gb_per_s:g} GB/s and {near.latency_us:g} us, between hosts "
        f"{far.gb_per_s:g} GB/s and {far.latency_us:g} us, for each rank",
        f"KV gets {device.memory.kv_share:.0%} of the memory that weights leave free",
        "a windowed layer keeps the KV of its whole context",
    ]
    if job.tp > 1:
        said.append(
            f"tensor parallelism over {job.tp} ranks: two sums a layer; embeddings, norms and "
            "experts are whole on every rank"
        )
    if model.total != model.active:
        said.append("routed experts: a token is sent to as many as config.json says, evenly")
    if model.max_len is not None and job.context > model.max_len:
        said.append(
            f"the model was made for {model.max_len} positions: a server refuses {job.context}"
        )
    used = (
        f"rates.{job.dtype}.",
        "memory.gb",
        "memory.kv_gb",
        "links.",
        "hop_us",
        "layer_us",
        "step_us",
        *(("memory.host_gb",) if job.host_memory else ()),
    )
    kinds = sorted({source for path, source in device.sources.items() if path.startswith(used)})
    said += [f"source: {source}" for source in kinds]
    return [*said, *model.notes]


def text_report(found: dict[str, Any]) -> list[str]:
    """The lines of ``sizing``'s result."""
    model, job, memory = found["model"], found["job"], found["memory_per_rank"]
    active = model["active_parameters"]
    of_those = f", {active / 1e9:.4g} B active" if active != model["parameters"] else ""
    windowed = model["windowed_layers"]
    lines = [
        f"{model['name']} ({model['model_type'] or 'unknown type'}): "
        f"{model['parameters'] / 1e9:.4g} B parameters{of_those}, {model['layers']} layers"
        + (f" ({windowed} with a window)" if windowed else "")
        + f", {_size(model['kv_bytes_per_token_and_rank'])} of KV a token and rank",
        f"{job['hosts']} hosts x {job['ranks_per_host']} ranks of {found['device']['name']}: "
        f"context over {job['cp']}, layers over {job['tp']}; {job['dtype']}",
        "",
        f"memory of a rank with {tokens(job['context'])} tokens, {_size(memory['total'])}"
        + ("" if memory["fits"] else ": DOES NOT FIT"),
        f"  [{_bar(memory)}]",
    ]
    for name, mark in PARTS:
        lines.append(f"  {mark} {name:<12} {_size(memory[name]):>10}")
    lines.append(
        f"  KV may take {_size(memory['kv_room'])}; {_size(memory['reserved'])} are reserved"
    )
    lines += ["", "largest context by number of ranks"]
    most = max(row["tokens"] for row in found["largest_context"]) or 1
    for row in found["largest_context"]:
        bar = "=" * round(WIDTH * row["tokens"] / most)
        lines.append(f"  {row['ranks']:>5} {tokens(row['tokens']):>8}  {bar}")
    host = found["host_memory"]
    if host["per_rank"]:
        back = f"; the context comes back in {_time(host['back_s'])}" if host["back_s"] else ""
        lines.append(
            f"  host memory of {_size(host['per_rank'])} a rank keeps {tokens(host['tokens'])} "
            f"tokens of prompts' beginnings and preempted requests more{back}"
        )
    lines += ["", f"predicted for a prompt of {tokens(job['context'])} tokens",
              f"  {'ranks':>5}  {'mode':<14} {'TTFT':>10} {'TPOT':>10}"]  # fmt: skip
    for row in found["predictions"]:
        note = "" if row["holds_context"] else "  (too few ranks for its KV)"
        lines.append(
            f"  {row['ranks']:>5}  {MODES[row['mode']]:<14} {_time(row['ttft_s']):>10} "
            f"{_time(row['tpot_s']):>10}{note}"
        )
    lines += _best(found["predictions"])
    return [*lines, "", "assumptions", *(f"  - {each}" for each in found["assumptions"])]


def _best(rows: list[dict[str, Any]]) -> list[str]:
    """Of what holds the context: the fastest to the first token, and per token at as many ranks.
    A request prefills by one mode and decodes by another, as the server's auto does."""
    able = [row for row in rows if row["holds_context"]]
    if not able:
        return ["  no number of ranks here holds the context"]
    first = min(able, key=lambda row: row["ttft_s"])
    then = min(
        (row for row in able if row["ranks"] == first["ranks"]), key=lambda row: row["tpot_s"]
    )
    return [
        f"  fastest: {first['ranks']} ranks, prefill {MODES[first['mode']]} "
        f"{_time(first['ttft_s'])}, decode {MODES[then['mode']]} {_time(then['tpot_s'])}"
    ]


def _bar(memory: dict[str, Any]) -> str:
    """The parts of a rank's memory, each at least one character where it is not nothing."""
    whole = max(memory["total"] - memory["reserved"], 1)
    bar = ""
    for name, mark in PARTS[:-1]:
        if memory[name]:
            bar += mark * max(1, min(round(WIDTH * memory[name] / whole), WIDTH))
    if len(bar) > WIDTH:
        return bar[: WIDTH - 1] + "!" if not memory["fits"] else bar[:WIDTH]
    return bar.ljust(WIDTH, PARTS[-1][1])


def tokens(count: int) -> str:
    """A length, in units of 1024 and 1024 x 1024 tokens where it is long."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
