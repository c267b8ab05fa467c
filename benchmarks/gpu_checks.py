"""Sections of ``benchmarks.gpu`` that say right or wrong: every kernel, and whole models over ranks
that share the device."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

import ds_cp
from benchmarks.gpu_common import attempt, llama, row, section
from benchmarks.gpu_kernels import layer, prompt
from ds_cp.attention.batch import Part, make_batch
from ds_cp.attention.kernels.choose import makers
from ds_cp.attention.kernels.cuda import CudaKernel
from ds_cp.attention.kernels.dense import NotInstalledError, candidates, fault
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.self_test import LIMIT
from ds_cp.attention.kernels.self_test import fault as kernel_fault
from ds_cp.attention.pages import Fresh, Pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.config import Config, load_config
from ds_cp.engine.llm import LLMEngine
from ds_cp.startup.build import build_worker
from ds_cp.startup.join import join_job
from ds_cp.startup.resources import socket_environment
from ds_cp.topology.job import detect

DIMS = (64, 128)
MODES = ({"mode": "local"}, {"mode": "ring", "ring_pass": "kv"},
         {"mode": "ring", "ring_pass": "q"}, {"mode": "tree"})  # fmt: skip


def kernels(device: torch.device, quick: bool) -> None:
    """Each kernel that loads against plain math, and each dense operator against fp64."""
    dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float16, torch.float32]
    for name, make in makers(device).items():
        for dtype in dtypes:
            attempt(f"kernel {name}, {dtype}", _kernel, name, make, dtype, device, quick)
    right: list[str] = []
    for choice in candidates(device):
        attempt(f"dense {choice.name}", _dense, choice, device, right)
    if device.type == "cuda":
        row("some dense operator", ok=bool(right), against=", ".join(right))
        attempt("prompts", _prompts, device, quick)


def _prompts(device: torch.device, quick: bool) -> None:
    """What a prompt of a bf16 model is computed by, at the sizes of one, against fp64: whole, as a
    partial, and a chunk behind many keys, its own where the layer left them and from pages."""
    spec, chunk = layer(quick), 512
    kernel = makers(device)["cuda"](device, torch.bfloat16)
    assert isinstance(kernel, CudaKernel)
    for length in (2048, 8192 + chunk):
        q, k, v, pages, batch = prompt(length, spec, device)
        first = 0 if length == 2048 else length - chunk
        q, k, v = q[first:], k[first:], v[first:]
        batch = make_batch([Part(((first, len(q)),), batch.parts[0].blocks)], device)
        at = torch.arange(first, length, device=device)
        double = Pages(pages.data.double(), replace(pages.shape, dtype=torch.float64))
        want = ReferenceKernel().paged_attention(q.double(), at, double, batch, spec)
        name = f"{len(q)} rows behind {first} keys" if first else f"a prompt of {length}"
        name = f"bf16, {name}, by {kernel.operator(spec, q.dtype) or 'our kernel'}"
        bare = Pages(pages.data, pages.shape)
        fresh = Pages(pages.data, pages.shape, Fresh(q, k, v))
        for how, given in (("pages", bare), ("where the layer left them", fresh)):
            got = kernel.paged_attention(q, at, given, batch, spec)
            _near(f"{name}, keys from {how}", got.out, want.out, got.lse, want.lse)
        if not first:
            out = kernel.prefill(q, k, v, batch, spec, pages.shape.block_size)
            if out is None:
                row(f"{name}, finished", ok=False, against="no operator took it")
            else:
                _near(f"{name}, finished", out, want.out)


def _near(what: str, got: torch.Tensor, want: torch.Tensor, *lse: torch.Tensor) -> None:
    wrong = float((got.double() - want).abs().max() / want.abs().max())
    if lse:
        wrong = max(wrong, float((lse[0].double() - lse[1]).abs().max()) / 4)
    row(what, ok=wrong <= LIMIT[torch.bfloat16], against=f"{wrong:.1e}")


def _kernel(name: str, make: Any, dtype: torch.dtype, device: torch.device, quick: bool) -> None:
    try:
        kernel = make(device, dtype)
    except Exception as err:
        missing = {"ok": False} if device.type == "cuda" else {"value": "not here"}
        row(f"kernel {name}, {dtype}", **missing, against=str(err)[:160])
        return
    for size in (16,) if quick else (16, 64):
        specs = [LayerSpec(4, 2, dim, dim**-0.5) for dim in DIMS[: 1 if quick else 2]]
        refused = next((why for s in specs if (why := kernel.refuses(s, size, dtype))), "")
        problem = refused or kernel_fault(kernel, specs, size, dtype, device)
        what = f"kernel {name}, {dtype}, blocks of {size}".replace("torch.", "")
        if refused:
            row(what, value="refuses", against=refused)
        else:
            row(what, ok=not problem, against=problem)


def _dense(choice: Any, device: torch.device, right: list[str]) -> None:
    try:
        dense = choice.load()
    except NotInstalledError:
        row(f"dense {choice.name}", value="not installed")
        return
    except Exception as err:
        row(f"dense {choice.name}", value="not here", against=str(err)[:160])
        return
    problems = [
        problem
        for dim in DIMS
        for heads in ((32, 8), (8, 8), (9, 3))
        if (problem := fault(dense, LayerSpec(*heads, dim, dim**-0.5), torch.bfloat16, device))
    ]
    row(f"dense {choice.name}", value=problems[0] if problems else "right")
    if not problems:
        right.append(choice.name)


def ranks(device: torch.device, quick: bool) -> None:
    """fp32 tokens of a small model over as many ranks as there are, against transformers'."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    job = detect(os.environ)
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    modes = MODES[:1] if size == 1 else MODES[1:]
    configs = [_config(device, mode) for mode in modes]
    world, threads = join_job(job, configs[0])
    model = llama(device, torch.float32, True, initializer_range=0.2)
    lengths = (5, 70) if quick else (5, 70, 700)
    prompts = [[(7 * i + n) % 128 for i in range(length)] for n, length in enumerate(lengths)]
    new = 8 if quick else 24
    want = [_transformers(model, prompt, new) for prompt in prompts]
    for mode, config in zip(modes, configs, strict=True):
        engine = LLMEngine(world, *build_worker(world, config, model, threads), config, None)
        params = ds_cp.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        outputs = engine.generate(prompts, params)
        got = [list(output.outputs[0].token_ids) for output in outputs]
        if world.rank == 0:
            differ = [n for n, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
            name = f"{size} rank{'s' * (size > 1)}, {' '.join(mode.values())}"
            said = f"prompts {differ} differ" if differ else ""
            if device.type == "cuda" and engine.facts.kernel != "cuda":
                said = f"{said} kernel cuda is not used".strip()
            row(f"{name}, kernel {engine.facts.kernel}", ok=not said, against=said)
    world.leave()


def _config(device: torch.device, mode: dict[str, str]) -> Config:
    """All ranks share the first device."""
    return load_config(
        {
            "model": "a loaded model", "device": device.type, "dtype": "fp32",
            "comm": {"backend": "gloo", "timeout_s": 60},
            "context_parallel": {**mode, "local_threshold": 0},
            "kv_cache": {"tokens_per_rank": 2048, "block_size": 16, "placement": "balanced",
                         "prefix_caching": False},
        }
    )  # fmt: skip


def _transformers(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        for _ in range(new):
            logits = model(ids, use_cache=False).logits[0, -1]
            ids = torch.cat((ids, logits.argmax()[None, None]), dim=1)
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    section({"kernels": kernels, "one-rank": ranks, "two-ranks": ranks, "four-ranks": ranks})
