"""A needle in a haystack: depth by length up to the model's limit, one rank against four.

SmolLM2-135M-Instruct in fp32, greedy, the prefix cache off, so that every token of every prompt is
computed. What must hold is that the answers are the same, token for token, in every cell; what the
model finds is drawn beside. Four ranks have a budget that one long prompt fills, so that it spans
all of them. Cells that the result holds already are not run again: ``--limit-s`` runs it in pieces.

    python -m benchmarks.needle
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, RESULTS, command, commit, finish, machine, parser
from benchmarks.needle.cells import NEW, Cell, answers, found, prompt
from benchmarks.needle.picture import draw
from tests.helpers.ranks import run_ranks

LENGTHS = (512, 1024, 2048, 4096, 8192)  # tokens; the last is the model's limit
DEPTHS = (0, 33, 67, 100)  # percent
PIECE = 5_000  # tokens of prompts that one start of the ranks computes, about
PIECE_S = 900.0  # seconds for these, on a busy machine


def main(argv: Sequence[str]) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    arguments.add_argument("--ranks", type=int, nargs=2, default=(1, 4))
    arguments.add_argument("--limit-s", type=float, default=1e9, help="start nothing after these")
    arguments.add_argument("--out", type=Path, default=RESULTS / "needle.json")
    args = arguments.parse_args(argv)
    began = time.monotonic()
    grid = [Cell(length, depth) for length in args.lengths for depth in args.depths]
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    facts = machine() | {"commit": commit(), "command": command("needle", argv)}
    for ranks in args.ranks:
        done = {(row["length"], row["depth"]) for row in rows if row["ranks"] == ranks}
        left = [cell for cell in grid if (cell.length, cell.depth) not in done]
        for piece in pieces(left):
            if time.monotonic() - began > args.limit_s:
                break
            rows += run(piece, ranks, max(args.lengths), facts)
            args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return report(rows, grid, tuple(args.ranks), args.out)


def pieces(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of about as many tokens each, in order."""
    found: list[list[Cell]] = []
    tokens = PIECE
    for cell in cells:
        if tokens + cell.length > PIECE:
            found.append([])
            tokens = 0
        found[-1].append(cell)
        tokens += cell.length
    return found


def run(
    cells: Sequence[Cell], ranks: int, longest: int, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of some cells on so many ranks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    share = longest if ranks == 1 else int(longest / ranks * 1.1)
    config = {
        "dtype": "fp32",
        "kv_cache": {"tokens_per_rank": -(-share // 64) * 64, "prefix_caching": False},
    }
    threads = max(1, (os.cpu_count() or 1) // ranks)
    prompts = [prompt(cell, tokenizer) for cell in cells]
    began = time.monotonic()
    got = run_ranks(answers, ranks, MODEL, config, prompts, threads, timeout=PIECE_S)[0]
    seconds = round(time.monotonic() - began, 1)
    print(f"{ranks} rank(s), {len(cells)} cells, {seconds} s", file=sys.stderr, flush=True)
    about = {name: facts[name] for name in ("date", "commit", "machine", "torch")}
    return [
        {"ranks": ranks, "length": cell.length, "depth": cell.depth, "key": cell.key}
        | {"tokens": list(tokens), "text": text, "modes": list(modes), "found": found(cell, text)}
        | about
        for cell, (tokens, text, modes) in zip(cells, got, strict=True)
    ]


def report(
    rows: Sequence[dict[str, Any]], grid: Sequence[Cell], ranks: tuple[int, ...], out: Path
) -> int:
    """Write and draw the grid; the exit code, 1 where a cell is missing or its answers differ."""
    by = {(row["ranks"], row["length"], row["depth"]): row for row in rows}
    sides = [[by.get((size, cell.length, cell.depth)) for cell in grid] for size in ranks]
    same = [
        a is not None and b is not None and a["tokens"] == b["tokens"]
        for a, b in zip(*sides, strict=True)
    ]
    summary = {
        "model": Path(MODEL).name,
        "cells": len(grid),
        "missing": sum(row is None for side in sides for row in side),
        "identical": sum(same),
        "answer_tokens": NEW,
        "found": {
            str(size): round(sum(row["found"] for row in side if row) / len(grid), 3)
            for size, side in zip(ranks, sides, strict=True)
        },
    }
    finish(summary | {"rows": list(rows)}, out)
    draw(by, grid, ranks, out.with_suffix(".png"))
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
