"""The result of all runs as a page, a picture and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import pyplot
from benchmarks.placement.simulate import BUDGET, POLICIES, Result, mean
from benchmarks.placement.traces import BLOCK, STEPS
from benchmarks.placement.wire import ELEMENT, HEAD_DIM, KV_HEADS, LAYERS, Q_HEADS

COLOURS = ("#1b6ca8", "#c8553d", "#4a8f4a", "#8a6fb0", "#b08a2e", "#5b5b5b", "#d17aa5", "#3fa7a0")
COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("policy", lambda r: r["policy"]),
    ("stored at first wait", lambda r: _percent(r["resident_at_first_queue"])),
    ("stored at first preemption", lambda r: _percent(r["resident_at_first_preemption"])),
    ("refused", lambda r: f"{r['refused']:.0f}"),
    ("preempted", lambda r: f"{r['preemptions']:.0f}"),
    ("decode KB a token", lambda r: _kilo(r["decode_bytes_per_token"])),
    ("of it between hosts", lambda r: _kilo(r["decode_bytes_between_hosts_per_token"])),
    ("exchanges a decode step", lambda r: f"{r['exchanges_per_decode_step']:.0f}"),
    ("prefill KV shipped, MB", lambda r: f"{r['prefill_shipped_bytes'] / 1e6:.0f}"),
    ("prefix KV copied, MB", lambda r: f"{r['prefix_copied_bytes'] / 1e6:.0f}"),
    ("longest KV on a rank", lambda r: f"{r['longest_kv_on_one_rank']:.0f}"),
    ("stayed local", lambda r: _percent(r["local_share"])),
    ("prefix hits, tokens", lambda r: f"{r['prefix_hit_tokens']:.0f}"),
    ("of prompts", lambda r: _percent(r["prefix_hit_share"])),
    ("evicted", lambda r: f"{r['evictions']:.0f}"),
    ("max / mean", lambda r: f"{r['imbalance']:.2f}"),
    ("steps", lambda r: f"{r['steps']:.0f}"),
)  # fmt: skip
BEST: tuple[tuple[str, str, int], ...] = (  # figure, its name, 1 where less is better
    ("decode_bytes_per_token", "decode bytes a token", 1),
    ("exchanges_per_decode_step", "exchanges a decode step", 1),
    ("prefill_shipped_bytes", "prefill KV shipped", 1),
    ("prefix_copied_bytes", "prefix KV copied", 1),
    ("longest_kv_on_one_rank", "longest KV on a rank", 1),
    ("kv_read_by_busiest_rank", "KV that the busiest rank reads in a decode step", 1),
    ("local_share", "stayed local", -1),
    ("prefix_hit_tokens", "prefix-hit tokens", -1),
    ("imbalance", "max / mean of used blocks", 1),
    ("preemptions", "preemptions", 1),
    ("steps", "steps", 1),
)
EXPLAINED = """\
# Placement policies on the same traces

1. Each row is a mean over {seeds} seeded traces; every policy gets the same arrivals, prompts and answers, in mode auto, blocks of 16 tokens, {budget} tokens of budget a rank and step. Command: `{command}`; no clock, no device, the same files each time.
2. *Stored at first wait*, *at first preemption*: tokens whose KV is stored, as a share of what all ranks hold, when for the first time a request waits that needs more blocks than are available, and when one has to give its blocks back. Blocks promised to a prompt that is being computed are not counted, so a document that waits or has just begun makes these small; the table *Filling* shows the same without documents that come late. A dash: it did not happen.
3. *Refused*: prompts longer than all ranks together hold. *Preempted*: requests whose blocks were taken back, computed again later.
4. *Decode KB a token*: what all ranks send for attention in decode steps, in 1,000 bytes by token of an answer, local ones included: (N-1) * L*H*D*e of queries and (N-1) * L*H*(D*e+4) of partials for a request over N ranks (an all-to-all of partials to their owners, plus sharing Q; between hosts once per other host), SmolLM2-135M in fp32: L 30, H 9, G 3, D 64, e 4.
5. *Exchanges a decode step*: rounds one after the other, over the 30 layers: 60 when some request spans one host, 120 when some request spans two, 0 when none spans; all requests of a step share them.
6. *Prefill KV shipped*: new KV computed on another rank than it is stored on, 2*L*G*D*e a token; *prefix KV copied*: cached blocks copied to the rank of a request that stays local. *Longest KV on a rank*: the most tokens of one request that one rank reads in a decode step, which bounds how much spanning helps.
7. *Stayed local*: answers that were on one rank from first to last token. *Prefix hits*: prompt tokens that were found instead of computed; *evicted*: cached blocks given away for new ones.
8. *Max / mean*: used share of the fullest rank by that of all ranks, each summed over the steps; 1 is level. *Steps*: to serve the whole trace, new sessions arrive until step {steps}."""  # noqa: E501


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _kilo(count: float) -> str:
    return f"{count / 1000:.1f}"


def wins(rows: Sequence[dict[str, Any]], figure: str, sign: int) -> dict[str, int]:
    """On how many (cell, seed) each policy is best; a tie counts for all that share it."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["seed"]), []).append(row)
    found = dict.fromkeys(POLICIES, 0)
    for group in groups.values():
        best = min(sign * row[figure] for row in group)
        for row in group:
            found[row["policy"]] += sign * row[figure] == best
    return found


def markdown(result: Result, seeds: Sequence[int], command: str) -> str:
    """The page: what is what, what one learns, and the tables."""
    lines = [EXPLAINED.format(seeds=len(seeds), budget=BUDGET, steps=STEPS, command=command)]
    lines += [f"{number}. {text}" for number, text in enumerate(learned(result), 9)]
    lines += ["", "![Used blocks of each rank](placement.svg)"]
    means = result.means()
    for cell in dict.fromkeys(row["cell"] for row in means):
        rows = [row for row in means if row["cell"] == cell]
        long = rows[0]["local_threshold"]
        about = f"blocks {', '.join(map(str, rows[0]['blocks']))}"
        if long:
            about += f"; prompts above {long:.0f} tokens span all ranks"
        table = [[show(row) for _, show in COLUMNS] for row in rows]
        lines += ["", f"## {cell}", "", f"{about}.", "", *_table([c for c, _ in COLUMNS], table)]
    lines += ["", "## Filling", "", FILLING, "", *_table(*_filling(result.fills))]
    count = len(result.rows) // len(POLICIES)
    best = [
        [name, *(str(n) for n in wins(result.rows, figure, sign).values())]
        for figure, name, sign in BEST
    ]
    lines += ["", "## Best how often", "", f"Of {count} traces, ties counted for each.", ""]
    lines += _table(["lowest, or for local and hits highest", *POLICIES], best)
    return "\n".join(lines) + "\n"


FILLING = """\
One document of 1.5 average ranks, then every other step a request of 64 to 768 tokens, none ends: \
stored share when the first has to wait, and after that (nobody new) when the first is \
preempted; in brackets, over the seeds, how often the document was refused. The row *mode local* \
cannot span."""


def _filling(fills: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(row["cell"] for row in fills))
    kinds = list(dict.fromkeys((row["policy"], row["mode"]) for row in fills))
    body = []
    for policy, mode in kinds:
        line = ["mode local" if mode == "local" else policy]
        for name in names:
            rows = [r for r in fills if (r["cell"], r["policy"], r["mode"]) == (name, policy, mode)]
            wait, preempted = (
                _percent(mean([r[f] for r in rows])) for f in ("at_first_wait",
                                                                "at_first_preemption")
            )  # fmt: skip
            line.append(f"{wait}, {preempted} ({sum(r['refused'] for r in rows)})")
        body.append(line)
    return ["policy", *names], body


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(row)} |" for row in rows]


def learned(result: Result) -> list[str]:
    """What the numbers show, as numbers."""
    auto = [r for r in result.fills if r["mode"] == "auto"]
    local = [r for r in result.fills if r["mode"] == "local"]
    apart = 0.0
    for figure in ("at_first_wait", "at_first_preemption"):
        for cell, seed in {(r["cell"], r["seed"]) for r in auto}:
            some = [r[figure] for r in auto if (r["cell"], r["seed"]) == (cell, seed)]
            apart = max(apart, max(some) - min(some))
    fits = (
        f"What fits hardly depends on the policy: filling, the three differ by at most "
        f"{100 * apart:.1f} points; the first preemption comes at "
        f"{_percent(mean([r['at_first_preemption'] for r in auto]))} stored, in mode local at "
        f"{_percent(mean([r['at_first_preemption'] for r in local]))}."
    )
    total_of = {p: [r for r in result.rows if r["policy"] == p] for p in POLICIES}
    parts = []
    for figure, name, unit in (
        ("decode_bytes_per_token", "decode KB a token", 1e3),
        ("longest_kv_on_one_rank", "longest KV on a rank", 1),
        ("prefill_shipped_bytes", "prefill KV shipped in MB", 1e6),
        ("local_share", "stayed local in %", 0.01),
    ):
        means = [f"{(mean([r[figure] for r in total_of[p]]) or 0) / unit:.0f}" for p in POLICIES]
        parts.append(f"{name} {' / '.join(means)}")
    count = len(result.rows) // len(POLICIES)
    bests = []
    for figure, name, sign in BEST[:1] + BEST[2:5:2]:
        found = wins(result.rows, figure, sign)
        policy = max(POLICIES, key=found.__getitem__)
        bests.append(f"{name} is lowest with {policy} in {found[policy]}")
    over = (
        f"Means over all {count} traces, {' / '.join(POLICIES)}: {'; '.join(parts)}. "
        f"Of these traces, {', '.join(bests)}; the last table has the rest."
    )
    return [fits, over]


def plot(result: Result, path: Path) -> None:
    """A row of panels per cell, one per policy: used share of each rank over steps."""
    plots = pyplot()
    names = list(dict.fromkeys(cell for cell, _ in result.used))
    shown = [names[0], *(n for n in names if n != names[0] and names[0] in n)][:2]
    figure, axes = plots.subplots(
        len(shown), len(POLICIES), figsize=(9, 1 + 1.9 * len(shown)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, cell in zip(axes, shown, strict=True):
        for axis, policy in zip(line, POLICIES, strict=True):
            used = result.used[cell, policy]
            wide = max(1, len(used) // 160)  # steps that one point is the mean of
            parts = [used[at : at + wide] for at in range(0, len(used), wide)]
            for rank in range(len(used[0])):
                axis.plot(
                    [wide * i for i in range(len(parts))],
                    [100 * sum(step[rank] for step in part) / len(part) for part in parts],
                    color=COLOURS[rank % len(COLOURS)], linewidth=0.9, label=f"rank {rank}",
                )  # fmt: skip
            axis.set_ylim(0, 103)
            axis.set_title(policy, fontsize=9)
            axis.grid(True, linewidth=0.3, color="#cccccc")
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"{cell.replace(', long', f',{chr(10)}long')}\nused blocks, %",
                           fontsize=8)  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
                  fontsize=8)  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    plots.close(figure)


def write(result: Result, out: Path, seeds: Sequence[int], args: Sequence[str]) -> None:
    """placement.json, .md and .svg in ``out``."""
    command = " ".join(["python -m benchmarks.placement", *args])
    found = {
        "command": command, "seeds": list(seeds),
        "shapes": {"layers": LAYERS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS,
                   "head_dim": HEAD_DIM, "element": ELEMENT, "block_size": BLOCK},
        "means": result.means(), "rows": result.rows, "filling": result.fills,
    }  # fmt: skip
    lines = [
        f" {json.dumps(name)}: " + (
            "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
            if name in ("means", "rows", "filling") else json.dumps(value)
        )
        for name, value in found.items()
    ]  # fmt: skip
    (out / "placement.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (out / "placement.md").write_text(markdown(result, seeds, command))
    plot(result, out / "placement.svg")
