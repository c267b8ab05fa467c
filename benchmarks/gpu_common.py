"""What the sections of ``benchmarks.gpu`` share: arguments, rows, times, models."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def row(what: str, **values: Any) -> None:
    """A row of the table: ``value`` or ``ok``, ``against`` and ``target`` as text."""
    print("ROW " + json.dumps({"what": what, **values}), flush=True)


def section(sections: dict[str, Callable[[torch.device, bool], None]]) -> None:
    """Run the section that the command line names."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name", choices=sections)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--quick", action="store_true")
    args, _ = arguments.parse_known_args()  # launchers may add --local_rank
    sections[args.name](torch.device(args.device), args.quick)


def attempt(what: str, work: Callable[..., None], *args: Any) -> None:
    """``work(*args)``, or a row that says why not: the next ones are still worth running."""
    try:
        work(*args)
    except Exception as err:
        traceback.print_exc()
        first = (str(err).strip() or type(err).__name__).splitlines()[0]
        row(what, ok=False, against=first[:160])


def seconds(work: Callable[[], Any], device: torch.device, budget_s: float = 1.5) -> float:
    """Least seconds of a call, after two to warm up; on a GPU by its own clock."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        return min(_one(work) for _ in range(3))
    torch.cuda.synchronize()
    end, best = time.monotonic() + budget_s, float("inf")
    for _ in range(200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
        if time.monotonic() > end:
            break
    return best


def _one(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def llama(device: torch.device, dtype: torch.dtype, quick: bool, **changes: Any) -> Any:
    """A random Llama of the shape of Llama 3.2 1B; with ``quick`` a tiny one."""
    sizes: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rope_theta": 500000.0,
    }  # fmt: skip
    if quick:
        sizes |= {
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        }  # fmt: skip
    config = LlamaConfig(**{**sizes, "bos_token_id": None, "eos_token_id": None, **changes})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
