"""ds_cp's engine over the ranks of this job: time to the first token, and per further token."""

from __future__ import annotations

import os
from typing import Any

import child
import torch

import ds_cp


def start(options: child.Case) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16)
    weight_bytes = sum(p.nbytes for p in model.parameters())  # tied ones once
    budget = -(-(options["longest"] + 128) // 64) * 64
    ranks = int(os.environ["WORLD_SIZE"])
    engine = ds_cp.init_inference(model, {
        "threads_per_rank": options["threads"],
        "max_model_len": options["longest"] + 64,
        "tensor_parallel": {"tp_size": options.get("tp", 1)},
        "context_parallel": {"mode": "auto" if ranks > 1 else "local", "local_threshold": 0},
        "kv_cache": {"tokens_per_rank": budget, "prefix_caching": False},
    })  # fmt: skip
    vocab = model.config.vocab_size

    def run(case: child.Case) -> child.Case:
        prompt = child.tokens_of(case["tokens"], case["seed"], vocab)
        params = ds_cp.SamplingParams(max_tokens=case["new"], temperature=0.0, ignore_eos=True)
        outputs = engine.generate(prompt, params)
        if not engine.is_driver:
            return {}
        [output] = outputs
        told = output.metrics
        assert told.first_token_time is not None and told.finished_time is not None
        return {
            "ttft": told.first_token_time - told.arrival_time,
            "tpot": (told.finished_time - told.first_token_time) / max(1, case["new"] - 1),
            "ids": list(output.outputs[0].token_ids),
            "kernel": engine.facts.kernel,
            "weight_bytes": weight_bytes,
            "kv_bytes": engine.facts.bytes_per_token,
        }

    return run


if __name__ == "__main__":
    child.serve(start)
