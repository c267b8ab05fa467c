"""Scores of lm_eval's backends on the tasks beside this file. It runs in lm_eval's environment.

``python score.py MODEL_FOLDER SERVED_NAME BASE_URL`` prints one JSON object as its last line: for
each backend and task its metrics, and each sample's numbers and texts. Nothing asks a hub.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"
LIKELIHOODS = ["facts", "passages"]
WORDS = ["answers"]
TURNS = ["replies"]  # with examples as earlier turns


def main(folder: str, name: str, url: str) -> None:
    torch.set_num_threads(1)
    own = {"pretrained": folder, "dtype": "float32", "device": "cpu"}
    served = {"model": name, "num_concurrent": 4, "max_retries": 1, "max_length": 1024}
    text = {"tokenizer": folder, "tokenizer_backend": "huggingface"}
    completions = {**served, **text, "base_url": f"{url}/v1/completions"}
    chat = {**served, "base_url": f"{url}/v1/chat/completions"}
    found = {
        "hf": scores("hf", own, [*LIKELIHOODS, *WORDS], False),
        "local-completions": scores(
            "local-completions", completions, [*LIKELIHOODS, *WORDS], False
        ),
        "hf, chat": scores("hf", own, TURNS, True),
        "local-chat-completions": scores("local-chat-completions", chat, TURNS, True),
    }
    versions = {package: version(package) for package in ("lm-eval", "torch", "transformers")}
    print(json.dumps({"versions": versions, "backends": found}))


def scores(model: str, args: dict[str, Any], tasks: list[str], chat: bool) -> dict[str, Any]:
    result = lm_eval.simple_evaluate(
        model=model,
        model_args=args,
        tasks=tasks,
        batch_size=1,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    )
    return {
        task: {
            "metrics": {
                key: value
                for key, value in result["results"][task].items()
                if isinstance(value, float) and "stderr" not in key
            },
            "samples": [
                {"id": sample["doc_id"], "answers": sample["filtered_resps"]}
                for sample in sorted(result["samples"][task], key=lambda one: one["doc_id"])
            ],
        }
        for task in tasks
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
