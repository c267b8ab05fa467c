"""transformers alone, its default attention and its own cache, greedy."""

from __future__ import annotations

import time
from typing import Any

import child
import torch


def start(options: child.Case) -> Any:
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(case: child.Case) -> child.Case:
        ids = torch.tensor([child.tokens_of(case["tokens"], case["seed"], model.config.vocab_size)])
        cache = DynamicCache(config=model.config)
        stamps, drawn = [time.perf_counter()], []
        for _ in range(case["new"]):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            drawn.append(int(ids))
            stamps.append(time.perf_counter())
        return {
            "ttft": stamps[1] - stamps[0],
            "tpot": (stamps[-1] - stamps[1]) / max(1, case["new"] - 1),
            "ids": drawn,
        }

    return run


if __name__ == "__main__":
    child.serve(start)
