"""Greedy tokens and logits against transformers for every mode, placement and number of ranks.

    python -m benchmarks.exactness_grid reference            # once: transformers, one process
    python -m benchmarks.exactness_grid run --ranks 1 2 3 4  # the grid; appends to the table
    python -m benchmarks.exactness_grid table                # the table as Markdown

20 prompts of 5 to 7,000 tokens, 64 new tokens each, SmolLM2-135M-Instruct, fp32. Per cell: prompts
whose 64 tokens are equal, and the largest difference of any logit at any of the 20 x 64 steps (up
to the first differing token of a prompt, after which the inputs differ). Budgets are set so that
the long prompts span all ranks. A cell that is in the results already is skipped, so a run can be
resumed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import MODEL, RESULTS, machine, parser

WORK = Path(".cache/exactness")
TABLE = RESULTS / "exactness_grid.jsonl"
LENGTHS = [
    5, 7, 12, 17, 31, 48, 63, 64, 65, 90, 127, 128, 200, 255, 321, 400, 600, 1000, 1900, 7000,
]  # fmt: skip
NEW = 64
MODES = {
    "ring": ("ring", "auto"),
    "tree": ("tree", "auto"),
    "local": ("local", "auto"),
    "ring_q": ("ring", "q"),
    "auto": ("auto", "auto"),
}
PLACEMENTS = ("fill_then_spill", "round_robin", "balanced")


def prompts() -> list[list[int]]:
    """Real text: the licence as tokens, from a different place for every prompt, round and
    round."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL)(Path("LICENSE").read_text())["input_ids"]
    ids = ids * (2 + max(LENGTHS) // len(ids))
    return [ids[37 * i : 37 * i + n] for i, n in enumerate(LENGTHS)]


def reference() -> None:
    """transformers' greedy tokens and the logits of each of the 64 steps."""
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = []
    for number, prompt in enumerate(prompts()):
        began = time.time()
        cache, ids, out, rows = DynamicCache(config=model.config), torch.tensor([prompt]), [], []
        with torch.inference_mode():
            for _ in range(NEW):
                step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                rows.append(step.logits[0, -1].clone())
                out.append(int(rows[-1].argmax()))
                ids = torch.tensor([[out[-1]]])
        tokens.append(out)
        torch.stack(rows).numpy().tofile(WORK / f"logits-{number}.bin")
        print(f"prompt {number}: {len(prompt)} tokens, {time.time() - began:.1f} s", flush=True)
    (WORK / "tokens.json").write_text(json.dumps(tokens))


def cell_config(mode: str, placement: str, ranks: int) -> dict:  # type: ignore[type-arg]
    """Budgets: local needs the longest prompt on one rank; else 1.15 x its share, so that it
    spans."""
    name, ring_pass = MODES[mode]
    longest = max(LENGTHS) + NEW
    share = longest + 128 if mode == "local" or ranks == 1 else int(longest / ranks * 1.15) + 128
    return {
        "model": MODEL,
        "dtype": "fp32",
        "threads_per_rank": 1,
        "context_parallel": {"mode": name, "ring_pass": ring_pass},
        "kv_cache": {
            "tokens_per_rank": share,
            "placement": placement,
            "block_size": 16,
            "prefix_caching": False,  # every token of every prompt is computed
        },
        "scheduler": {"max_num_seqs": 20},
    }


def one_cell(mode: str, placement: str) -> None:
    """Run under torchrun: every rank measures the logits it samples from, rank 0 the tokens."""
    import ds_cp
    import ds_cp.worker.worker as worker_module

    about = machine()
    asked, want = prompts(), json.loads((WORK / "tokens.json").read_text())
    worst = [0.0]
    real_sample = worker_module.sample_rows

    def watched(logits_RV, rows):  # type: ignore[no-untyped-def]
        """Requests are numbered from 1 in the order of the prompts."""
        drawn = real_sample(logits_RV, rows)
        for row, logits, found in zip(rows, logits_RV, drawn, strict=True):
            number = row.request - 1
            reference = torch.from_file(
                str(WORK / f"logits-{number}.bin"), shared=False, size=NEW * len(logits)
            ).view(NEW, -1)[row.index]
            if seen.setdefault(number, True):
                worst[0] = max(worst[0], float((logits - reference).abs().max()))
            seen[number] = seen[number] and found.token == want[number][row.index]
        return drawn

    seen: dict[int, bool] = {}
    worker_module.sample_rows = watched
    ranks = int(os.environ["WORLD_SIZE"])
    engine = ds_cp.init_inference(MODEL, cell_config(mode, placement, ranks))
    began = time.time()
    params = ds_cp.SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    outputs = engine.generate(asked, params)
    mine = f"{mode}-{placement}-{ranks}"
    (WORK / f"worst-{mine}-{engine._worker.world.rank}").write_text(repr(worst[0]))
    engine._worker.cp.barrier()
    if engine.is_driver:
        equal = [list(o.outputs[0].token_ids) == w for o, w in zip(outputs, want, strict=True)]
        row = {
            "ranks": ranks, "mode": mode, "placement": placement, "prompts": len(equal),
            "equal": sum(equal),
            "different": [LENGTHS[i] for i, same in enumerate(equal) if not same],
            "logit_difference": max(
                float((WORK / f"worst-{mine}-{r}").read_text()) for r in range(ranks)
            ),
            "modes_used": sorted({m for o in outputs for m in o.metrics.modes}),
            "seconds": round(time.time() - began, 1), **about,
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
        }  # fmt: skip
        with TABLE.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    engine.shutdown()


def run(ranks: list[int], modes: list[str]) -> None:
    done = set()
    if TABLE.exists():
        rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
        done = {(r["ranks"], r["mode"], r["placement"]) for r in rows}
    for mode, size, placement in itertools.product(modes, ranks, PLACEMENTS):
        if size == 1 and placement != PLACEMENTS[0]:
            continue  # with one rank there is only one place
        if (size, mode, placement) in done:
            continue
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
            "--master-port", "0", "--standalone", "-m", "benchmarks.exactness_grid",
            "cell", mode, placement,
        ]  # fmt: skip
        subprocess.run(command, check=False, timeout=1800)


def table() -> None:
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    print("| ranks | mode | placement | equal prompts | largest logit difference | date |")
    print("|---|---|---|---|---|---|")
    for r in sorted(rows, key=lambda r: (r["ranks"], r["mode"], r["placement"])):
        print(
            f"| {r['ranks']} | {r['mode']} | {r['placement']} | {r['equal']} of {r['prompts']} | "
            f"{r['logit_difference']:.1e} | {r['date']} |"
        )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=["reference", "run", "table", "cell"])
    arguments.add_argument("rest", nargs="*")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    arguments.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    args = arguments.parse_args()
    if args.what == "cell":
        one_cell(*args.rest)
    elif args.what == "run":
        run(args.ranks, args.modes)
    else:
        {"reference": reference, "table": table}[args.what]()


if __name__ == "__main__":
    main()
