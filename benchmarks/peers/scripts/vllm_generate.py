"""vLLM on the CPU, one engine in this process, greedy, without its prefix cache."""

from __future__ import annotations

import os
import time
from typing import Any

import child


def start(options: child.Case) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options['threads'] - 1}")
    from vllm import LLM, SamplingParams

    llm = LLM(
        options["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=options["longest"] + 64,
        max_num_seqs=2,
    )
    vocab = llm.llm_engine.model_config.get_vocab_size()
    engine = llm.llm_engine

    def run(case: child.Case) -> child.Case:
        prompt = child.tokens_of(case["tokens"], case["seed"], vocab)
        params = SamplingParams(
            max_tokens=case["new"], temperature=0.0, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        engine.add_request(f"{case['seed']}-{began}", {"prompt_token_ids": prompt}, params)
        first, last, ids = None, began, []
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.outputs[0].token_ids:
                    last = time.perf_counter()
                    first = last if first is None else first
                    ids = list(output.outputs[0].token_ids)
        assert first is not None
        return {
            "ttft": first - began,
            "tpot": (last - first) / max(1, case["new"] - 1),
            "ids": ids,
        }

    return run


if __name__ == "__main__":
    child.serve(start)
