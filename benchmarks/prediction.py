"""What ``ds-cp plan`` predicts beside what was measured: published figures, and our own runs.

    torchrun --nproc-per-node N -m benchmarks.prediction --measure         N ranks, 1, 2 or 4
    python -m benchmarks.prediction [--write]

The first measures on this machine, in one job: the rates and links of a device file, then times to
the first and per further token of SmolLM2 in bf16, in each mode, into
benchmarks/results/prediction_runs_N_ranks.json. The second predicts what lies there and the figures
of arXiv 2411.01783 (``benchmarks/published.py``) by the cost model, and prints errors; ``--write``
puts them into benchmarks/results/prediction.md and .json. An error is predicted over measured, less
one; figures that a rate was fitted to are marked and not in the means.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import published
from benchmarks.common import MODEL, RESULTS, command, commit, finish, machine, parser
from ds_cp.cost import Passing
from ds_cp.sizing.device import Device
from ds_cp.sizing.job import Job
from ds_cp.sizing.model import read_model
from ds_cp.sizing.predict import cost_model

LENGTHS = (1000, 4000)  # tokens of a prompt
NEW = 12  # tokens of an answer
ROUNDS = 2  # the fastest counts
WAYS: dict[Passing, tuple[str, str]] = {
    "local": ("local", "auto"), "kv": ("ring", "kv"), "q": ("ring", "q"), "tree": ("tree", "auto"),
}  # fmt: skip


# --- our own runs


def measure() -> None:
    """One job: rates, then runs. Rank 0 writes both."""
    import torch

    from benchmarks.speed import time_engine
    from ds_cp.comm.links import LinkSpeed
    from ds_cp.config import Config, load_config
    from ds_cp.engine.llm import LLMEngine
    from ds_cp.model.loading import load_model
    from ds_cp.model.source import find_model
    from ds_cp.startup.build import build_worker
    from ds_cp.startup.device_file import device_of
    from ds_cp.startup.join import join_job
    from ds_cp.startup.rates import measure_rates
    from ds_cp.startup.resources import socket_environment
    from ds_cp.topology.job import detect

    def config(mode: Passing) -> Config:
        name, ring_pass = WAYS[mode]
        return load_config(
            {
                "model": MODEL,
                "dtype": "bf16",
                "context_parallel": {"mode": name, "ring_pass": ring_pass},
                "kv_cache": {
                    "tokens_per_rank": 8192,
                    "placement": "balanced",
                    "prefix_caching": False,
                },
            }
        )

    job = detect(os.environ)
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    about = machine()
    world, threads = join_job(job, config("local"))
    rates = measure_rates(world, torch.bfloat16)
    runs = []
    prompt = torch.randint(100, 40000, (max(LENGTHS),), generator=torch.Generator().manual_seed(0))
    for mode in WAYS if world.size > 1 else ("local",):
        if mode == "local" and world.size > 1:
            continue
        each = config(mode)
        model = load_model(find_model(each.model), torch.bfloat16, torch.device("cpu"))
        engine = LLMEngine(world, *build_worker(world, each, model, threads), each, None)
        time_engine(engine, prompt[:200].tolist(), 4)
        for length in LENGTHS:
            times = [time_engine(engine, prompt[:length].tolist(), NEW) for _ in range(ROUNDS)]
            first, each_s = (min(pair) for pair in zip(*times, strict=True))
            runs.append({"mode": mode, "tokens": length, "ttft_s": first, "tpot_s": each_s})
    if world.rank == 0:
        if not rates.links:
            alone = LinkSpeed("within a host, no other rank", 1.0, 1.0)
            rates = type(rates)(**{**rates.__dict__, "links": (alone,)})
        device = device_of(rates, "this machine", "as measured", "cpu", "bf16", world.size)
        result = {
            "command": command("prediction", sys.argv[1:], world.size), **about,
            "commit": commit(), "ranks": world.size, "threads_per_rank": threads,
            "device": device, "runs": runs,
        }  # fmt: skip
        finish(result, RESULTS / f"prediction_runs_{world.size}_ranks.json")
    world.leave()


def own_rows(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """A job's runs beside the predictions by its own device file."""
    model, device = read_model(MODEL), Device.model_validate(measured["device"])
    ranks, found = measured["ranks"], []
    for run in measured["runs"]:
        job = Job(1, ranks, run["tokens"], "bf16")
        cost = cost_model(model, device, job, ranks)
        predicted = {
            "ttft_s": cost.forward_s(run["mode"], ranks, run["tokens"], 0),
            "tpot_s": cost.forward_s(run["mode"], ranks, 1, run["tokens"]),
        }
        for which, ours in predicted.items():
            found.append(
                {
                    "ranks": ranks, "mode": run["mode"], "tokens": run["tokens"],
                    "what": which[:4].upper(), "measured_s": run[which], "predicted_s": ours,
                    "error": ours / run[which] - 1,
                }
            )  # fmt: skip
    return found


# --- tables


def mean(errors: Iterable[float]) -> tuple[float, float]:
    """The mean and the largest of absolute errors."""
    sizes = [abs(error) for error in errors]
    return statistics.fmean(sizes), max(sizes)


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and largest error of each group of figures, without those that were fitted."""
    found = []
    for title, table, word in (
        ("tables 6 and 7 and text, TTFT", ("6", "7", "text"), "TTFT"),
        ("tables 6 and 7, TTIT", ("6", "7"), "TTIT"),
        ("table 8, a decode layer", ("8",), "attention"),
        ("table 4, TTFT", ("4",), "TTFT"),
    ):
        some = [r for r in result["published"] if r["table"] in table and word in r["what"]]
        row: dict[str, Any] = {"group": title}
        for name in ("calibrated", "shipped"):
            row[name] = mean(r[f"{name}_error"] for r in some if name == "shipped" or not r["fit"])
        found.append(row)
    for what in ("TTFT", "TPOT"):
        if some := [r for r in result["own"] if r["what"] == what]:
            found.append({"group": f"own runs, {what}", "measured": mean(r["error"] for r in some)})
    return found


def tables(result: dict[str, Any]) -> list[str]:
    """The result as Markdown."""
    lines = ["# Predicted and measured", "", f"`{result['command']}`, {result['date']}.", ""]
    lines += [
        "Published: arXiv 2411.01783, Llama 3 405B on H100 hosts of 8. *Calibrated*: with the "
        "rates of the paper's own machine and four numbers fitted to a row each, and memory to a "
        "fifth (`(fit)`), see "
        "`benchmarks/published.py`. *Shipped*: what `ds-cp plan --device h100` says, all weights "
        "in bf16, nothing fitted. Errors are predicted over measured, less one.",
        "", "| figures | calibrated: mean, largest error | shipped: mean, largest |",
        "|---|---|---|",
    ]  # fmt: skip
    for row in result["summary"]:
        cells = [_pair(row[name]) if name in row else "" for name in ("calibrated", "shipped")]
        if "measured" in row:
            cells = [_pair(row["measured"]) + " (rates measured in the same job)", ""]
        lines.append(f"| {row['group']} | {cells[0]} | {cells[1]} |")
    picks = result["choices"]
    for name in ("calibrated", "shipped"):
        right = sum(row[name] == row["published"] for row in picks)
        worst = max(row[f"{name}_regret"] for row in picks)
        lines += ["", f"Table 4, pass-KV or pass-Q, {name}: {right} of {len(picks)} as published; "
                  f"a wrong choice costs {worst:.1%} at most."]  # fmt: skip
    lines += ["", "| table | figure | published | calibrated | error | shipped | error |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["published"]:
        error = "(fit)" if row["fit"] else f"{row['calibrated_error']:+.1%}"
        lines.append(
            f"| {row['table']} | {row['what']} | {row['published_s']:.4g} s | "
            f"{row['calibrated_s']:.4g} s | {error} | {row['shipped_s']:.4g} s | "
            f"{row['shipped_error']:+.1%} |"
        )
    if result["own"]:
        lines += ["", "Own runs: SmolLM2-135M in bf16, ranks of one machine.", ""]
        for job in result["jobs"]:
            lines.append(
                f"- {job['ranks']} ranks of {job['threads_per_rank']} threads: {job['machine']}, "
                f"load {job['load']} before"
            )
        lines += ["", "| ranks | mode | tokens | what | measured | predicted | error |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['ranks']} | {r['mode']} | {r['tokens']} | {r['what']} | {r['measured_s']:.4g} s "
            f"| {r['predicted_s']:.4g} s | {r['error']:+.1%} |"
            for r in result["own"]
        ]
    return lines


def _pair(errors: Sequence[float]) -> str:
    return f"{errors[0]:.1%}, {errors[1]:.1%}"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--measure", action="store_true", help="run a job of this launcher")
    arguments.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = arguments.parse_args(argv)
    if args.measure:
        measure()
        return
    files = sorted(RESULTS.glob("prediction_runs_*_ranks.json"))
    jobs = [json.loads(file.read_text("utf-8")) for file in files]
    rows = [
        {
            "table": r.table, "what": r.what, "published_s": r.published,
            "calibrated_s": r.calibrated, "calibrated_error": r.calibrated / r.published - 1,
            "shipped_s": r.shipped, "shipped_error": r.shipped / r.published - 1, "fit": r.fit,
        }
        for r in published.rows()
    ]  # fmt: skip
    result: dict[str, Any] = {
        "command": command("prediction", sys.argv[1:] if argv is None else argv),
        **machine(),
        "commit": commit(),
        "published": rows,
        "choices": published.choices(),
        "own": [row for job in jobs for row in own_rows(job)],
        "jobs": jobs,
    }
    result["summary"] = summary(result)
    text = "\n".join(tables(result)) + "\n"
    print(text)
    if args.write:
        (RESULTS / "prediction.md").write_text(text, "utf-8")
    finish(result, RESULTS / "prediction.json" if args.write else None)


if __name__ == "__main__":
    main()
