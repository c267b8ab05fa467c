"""Worst error of attention over ranks against fp64 over the whole sequence, as a table.

    python -m benchmarks.attention_error [--hosts a,aabb] [--out FILE]

The cases are those of tests/helpers/attention_cases.py (layouts, head ratios, lengths that do
not divide, earlier KV, windows, soft caps, sinks, empty ranks). Errors are relative to the largest
reference value; bf16 errors are also given in units of 2**-8 (one bf16 ulp at that scale).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, finish, machine, parser
from ds_cp.comm.wire import World
from tests.helpers.attention_cases import LIMIT, cases, one_case
from tests.helpers.ranks import run_ranks, world_group

MODES = (("ring", "kv"), ("ring", "q"), ("tree", "kv"))


HOSTS = ("a", "aa", "aaa", "aaaa", "aaaaa", "aabb", "aabbc")  # the host of each rank


def worst(world: World, dtype: torch.dtype) -> dict[str, float]:
    """Of each mode the largest relative error of this rank's rows over all cases."""
    group = world_group(world)
    found = dict.fromkeys(
        (f"{mode} pass-{p}" if mode == "ring" else mode for mode, p in MODES), 0.0
    )
    for case in cases(world.size):
        for (mode, pass_), name in zip(MODES, found, strict=True):
            found[name] = max(found[name], one_case(group, case, dtype, mode, pass_))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--hosts", default=",".join(HOSTS), help="the host of each rank, per job"
    )
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args(argv)
    about = machine()
    rows: list[dict[str, Any]] = []
    print("| ranks | hosts | dtype | mode | cases | worst relative error | limit |")
    print("|---|---|---|---|---|---|---|")
    for hosts in args.hosts.split(","):
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
    result = {
        "command": command("attention_error", sys.argv[1:] if argv is None else argv),
        **about,
        "worst": {
            dtype: max(row["error"] for row in rows if row["dtype"] == dtype)
            for dtype in ("float32", "bfloat16")
        },
        "rows": rows,
    }
    finish(result, args.out)


if __name__ == "__main__":
    main()
