"""llama.cpp through llama-cpp-python: bf16 GGUF, flash attention on, greedy, token ids."""

from __future__ import annotations

import time
from typing import Any

import child


def start(options: child.Case) -> Any:
    import llama_cpp

    llm = llama_cpp.Llama(
        options["gguf"],
        n_ctx=options["longest"] + 64,
        n_threads=options["threads"],
        n_threads_batch=options["threads"],
        n_batch=512,
        flash_attn=True,
        logits_all=False,
        verbose=False,
        use_mmap=False,
    )

    def run(case: child.Case) -> child.Case:
        prompt = child.tokens_of(case["tokens"], case["seed"], llm.n_vocab())
        llm.reset()
        stamps, drawn = [time.perf_counter()], []
        for token in llm.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
            drawn.append(int(token))
            stamps.append(time.perf_counter())
            if len(drawn) == case["new"]:
                break
        return {
            "ttft": stamps[1] - stamps[0],
            "tpot": (stamps[-1] - stamps[1]) / max(1, case["new"] - 1),
            "ids": drawn,
        }

    return run


if __name__ == "__main__":
    child.serve(start)
