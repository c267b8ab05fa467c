"""``python -m benchmarks.placement``: all policies on all clusters and traces."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import benchmarks.placement
from benchmarks.common import RESULTS, parser
from benchmarks.placement.report import write
from benchmarks.placement.simulate import compare
from benchmarks.placement.traces import SEEDS, cells


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(benchmarks.placement.__doc__)
    arguments.add_argument("--out", type=Path, default=RESULTS)
    arguments.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = arguments.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = compare(cells(), SEEDS, args.processes)
    write(result, args.out, SEEDS, [])
    short = ("cell", "policy", "decode_bytes_per_token", "longest_kv_on_one_rank", "steps")
    print(json.dumps([{name: row[name] for name in short} for row in result.means()]))


if __name__ == "__main__":
    main()
