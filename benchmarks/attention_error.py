"""Worst error of attention over ranks against fp64 over the whole sequence, as a table.

    python -m benchmarks.attention_error [--out FILE]

The cases are those of tests/helpers/attention_cases.py (layouts, head ratios, lengths that do
not divide, earlier KV, windows, soft caps, sinks, empty ranks). Errors are relative to the largest
reference value; bf16 errors are also given in units of 2**-8 (one bf16 ulp at that scale).
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import torch

from ds_cp.comm.wire import World
from tests.helpers.attention_cases import LIMIT, cases, one_case
from tests.helpers.ranks import run_ranks, world_group

MODES = (("ring", "kv"), ("ring", "q"), ("tree", "kv"))


def worst(world: World, dtype: torch.dtype) -> dict[str, float]:
    group = world_group(world)
    found = dict.fromkeys(
        (f"{mode} pass-{p}" if mode == "ring" else mode for mode, p in MODES), 0.0
    )
    for case in cases(world.size):
        for (mode, pass_), name in zip(MODES, found, strict=True):
            found[name] = max(found[name], one_case(group, case, dtype, mode, pass_))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    print("| ranks | hosts | dtype | mode | cases | worst relative error | limit |")
    print("|---|---|---|---|---|---|---|")
    for hosts in ("a", "aa", "aaa", "aaaa", "aaaaa", "aabb", "aabbc"):
        for dtype, limit in LIMIT.items():
            per_rank = run_ranks(worst, len(hosts), dtype, hosts=list(hosts), timeout=600)
            for mode in per_rank[0]:
                error = max(found[mode] for found in per_rank)
                rows.append(
                    {"ranks": len(hosts), "hosts": len(set(hosts)), "dtype": str(dtype)[6:],
                     "mode": mode, "cases": len(cases(len(hosts))), "error": error, "limit": limit}
                )  # fmt: skip
                ulps = f" ({error * 2**8:.2f} ulp)" if dtype == torch.bfloat16 else ""
                print(
                    f"| {len(hosts)} | {len(set(hosts))} | {str(dtype)[6:]} | {mode} | "
                    f"{rows[-1]['cases']} | {error:.1e}{ulps} | {limit:.1e} |",
                    flush=True,
                )
    result = {"date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"date": result["date"], "worst_fp32": max(
        r["error"] for r in rows if r["dtype"] == "float32"), "worst_bf16": max(
        r["error"] for r in rows if r["dtype"] == "bfloat16")}))  # fmt: skip


if __name__ == "__main__":
    main()
