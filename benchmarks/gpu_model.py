"""Sections of ``benchmarks.gpu`` that time whole models: decode steps with and without graphs, and
time to first and further tokens beside transformers."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

import ds_cp
from benchmarks.gpu_common import llama, row, seconds, section
from ds_cp.comm.wire import World
from ds_cp.config import load_config
from ds_cp.engine.core import EngineCore
from ds_cp.engine.llm import LLMEngine
from ds_cp.outputs import Delta
from ds_cp.plan import Outcome
from ds_cp.startup.build import build_worker
from ds_cp.topology.hosts import Topology


def engine_of(model: Any, tokens: int, streams: int, deterministic: bool = False) -> LLMEngine:
    """One rank with room for so many tokens."""
    device = torch.device(model.device.type, 0) if model.device.type == "cuda" else model.device
    world = World(0, Topology(("here",)), device, 60.0, joined=False)
    config = load_config(
        {
            "model": "a loaded model", "device": device.type,
            "attention": {"deterministic": deterministic},
            "kv_cache": {"tokens_per_rank": -(-tokens // 64) * 64, "prefix_caching": False},
            "scheduler": {"max_num_seqs": streams, "max_num_batched_tokens": 8192},
        }
    )  # fmt: skip
    worker, facts = build_worker(world, config, model, torch.get_num_threads())
    for note in facts.notes:
        print(note)
    return LLMEngine(world, worker, facts, config, None)


def stamps(engine: LLMEngine, prompts: list[list[int]], new: int) -> list[float]:
    """Seconds from the start to each step that drew something."""
    core = engine._core
    assert core is not None
    found: list[float] = []

    def stamped(outcome: Outcome) -> list[Delta]:
        if outcome.sampled:
            found.append(time.perf_counter() - began)
        return EngineCore.apply(core, outcome)

    core.apply = stamped  # type: ignore[method-assign]
    began = time.perf_counter()
    params = ds_cp.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    engine.generate(prompts, params)
    del core.apply
    return found


def gap(times: list[float]) -> float:
    """Median seconds between the later half of the steps."""
    late = times[len(times) // 2 :]
    return statistics.median(b - a for a, b in zip(late, late[1:], strict=False))


def step(device: torch.device, quick: bool) -> None:
    """Steps of 64 streams, and of 1."""
    model = llama(device, torch.float32 if device.type == "cpu" else torch.bfloat16, quick)
    streams, new = (4, 8) if quick else (64, 48)
    length = 20 if quick else 500
    engine = engine_of(model, streams * (length + new + 64), streams)
    worker = engine._worker
    prompts = [[(i * 31 + n) % 100 for i in range(length)] for n in range(streams)]
    graphs = worker.graphs
    for count in (streams, 1):
        worker.graphs = None
        stamps(engine, prompts[:count], 4)
        eager = gap(stamps(engine, prompts[:count], new))
        row(f"decode step, {count} streams, eager", value=f"{eager * 1e3:.2f} ms")
        if graphs is None:
            row("graphs", value="none on this device")
            continue
        worker.graphs = graphs
        stamps(engine, prompts[:count], 4)
        took = gap(stamps(engine, prompts[:count], new))
        decodes = graphs.decodes
        if not decodes.captured:
            row(f"decode step, {count} streams, graphs", ok=False, against="nothing was captured")
            continue
        size = min(rows for rows, _ in decodes.captured if rows >= count)
        keys = max(keys for rows, keys in decodes.captured if rows == size)
        alone = seconds(decodes._graphs[size, keys].replay, device, 0.5)
        row(f"decode step, {count} streams, graphs", value=f"{took * 1e3:.2f} ms",
            against=f"{took / alone:.2f} of its kernels ({alone * 1e3:.2f} ms)",
            target="<= 1.1" if count == 64 else "")  # fmt: skip


def deterministic(device: torch.device, quick: bool) -> None:
    """What rows that do not depend on their company cost: off, off without graphs, and on."""
    decoder = llama(device, torch.float32 if device.type == "cpu" else torch.bfloat16, quick)
    streams, new, length, long = (4, 6, 20, 60) if quick else (64, 24, 500, 8192)
    prompts = [[(i * 31 + n) % 100 for i in range(length)] for n in range(streams)]
    prompt = [(i * 31) % 100 for i in range(long)]
    for on in (False, True):
        room = max(streams * (length + new + 64), long + 128)
        engine = engine_of(decoder, room, streams, on)
        name = f"deterministic {'on' if on else 'off'}, kernel {engine.facts.kernel}"
        graphs = engine._worker.graphs
        for how in (graphs, None) if graphs is not None and not on else (None,):
            engine._worker.graphs = how
            stamps(engine, prompts, 4)
            took = gap(stamps(engine, prompts, new))
            row(f"decode step, {streams} streams, {name}, {'graphs' if how else 'eager'}",
                value=f"{took * 1e3:.2f} ms")  # fmt: skip
        stamps(engine, [prompt], 1)
        row(f"TTFT {long}, {name}", value=f"{stamps(engine, [prompt], 1)[0] * 1e3:.2f} ms")
        del engine, graphs, how
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def model(device: torch.device, quick: bool) -> None:
    """Seconds to the first token and between tokens, a stream alone."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    decoder = llama(device, dtype, quick)
    lengths, new = ((30, 100), 4) if quick else ((1024, 8192, 32768), 32)
    theirs = {n: _transformers(decoder, n, new) for n in lengths}
    engine = engine_of(decoder, max(lengths) + new + 64, 4)
    for length in lengths:
        prompt = [(i * 31) % 100 for i in range(length)]
        stamps(engine, [prompt], 2)
        times = stamps(engine, [prompt], new)
        for name, ours, other in (
            ("TTFT", times[0], theirs[length][0]), ("TPOT", gap(times), theirs[length][1])
        ):  # fmt: skip
            row(f"{name} {length}, ours", value=f"{ours * 1e3:.2f} ms",
                against=f"transformers {other * 1e3:.2f} ms, {other / ours:.2f}x")  # fmt: skip


@torch.inference_mode()
def _transformers(decoder: Any, length: int, new: int) -> tuple[float, float]:
    from transformers import DynamicCache

    def once(count: int) -> list[float]:
        cache = DynamicCache(config=decoder.config)
        ids = torch.tensor([[(i * 31) % 100 for i in range(length)]], device=decoder.device)
        began, times = time.perf_counter(), []
        for _ in range(count):
            out = decoder(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            ids.tolist()  # the token is wanted on the host
            times.append(time.perf_counter() - began)
        return times

    decoder.set_attn_implementation("sdpa")
    once(2)
    times = once(new)
    return times[0], gap(times)


if __name__ == "__main__":
    section({"step": step, "deterministic": deterministic, "model": model})
