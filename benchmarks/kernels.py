"""The CPU operator against torch's own: prefill with lse and decode, in one process.

    python -m benchmarks.kernels [--threads N] [--rounds N] [--only prefill,decode] [--json FILE]

Rounds are interleaved: each round runs every contender once. With one thread the time is that of
the processor (other work on the machine takes none of it), with more it is the clock's. Minimum and
median are given; rates count the products of visible pairs only. ``mm`` is torch.mm of 1024 x 1024
in the same dtype, ``read`` the largest of a tensor of 256 MiB, in the same rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.common import command, finish, machine, parser
from ds_cp.attention.batch import Part, blocks_of_runs, make_batch
from ds_cp.attention.kernels.cpu import CpuKernel
from ds_cp.attention.pages import PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.native import Library, load

BLOCK = 64  # tokens
HEADS = {64: (16, 4), 128: (8, 2)}  # head_dim -> query and KV heads of a prefill
CPU = torch.device("cpu")
Contenders = dict[str, Callable[[], Any]]


def race(contenders: Contenders, rounds: int) -> dict[str, dict[str, float]]:
    """Minimum and median seconds of each contender, after one round that does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            begin = clock()
            run()
            taken[name].append(clock() - begin)
    return {
        name: {"min": min(times[1:]), "median": statistics.median(times[1:])}
        for name, times in taken.items()
    }


def ours(
    kernel: CpuKernel, q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, first: int
) -> Callable[[], Any]:
    """A call of the operator: queries from position ``first`` on over all keys, in pages."""
    num_keys, groups, dim = k_SGD.shape
    spec = LayerSpec(q_THD.shape[1], groups, dim, dim**-0.5)
    shape = PageShape.of(spec, BLOCK, q_THD.dtype, packed=True)
    pages = empty_pages(shape, -(-num_keys // BLOCK), CPU)
    at = torch.arange(num_keys)
    kernel.write(pages, k_SGD, v_SGD, at // BLOCK, at % BLOCK)
    blocks = blocks_of_runs(((0, num_keys),), BLOCK)
    batch = make_batch([Part(((first, len(q_THD)),), blocks)], CPU)
    positions = torch.arange(first, first + len(q_THD))
    return lambda: kernel.paged_attention(q_THD, positions, pages, batch, spec)


def prefill(kernel: CpuKernel, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Causal prefill of one sequence, with lse."""
    rows = []
    square = torch.randn(1024, 1024).to(dtype)
    for length in (4096, 8192):
        for dim, (heads, groups) in HEADS.items():
            q, k, v = (torch.randn(length, n, dim).to(dtype) for n in (heads, groups, groups))
            q_BHTD, k_BHSD, v_BHSD = (x.transpose(0, 1)[None] for x in (q, k, v))
            run = ours(kernel, q, k, v, 0)

            def flash(a: Any = q_BHTD, b: Any = k_BHSD, c: Any = v_BHSD, d: int = dim) -> Any:
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    a, b, c, 0.0, True, scale=d**-0.5
                )

            times = race({"ours": run, "torch": flash, "mm": lambda: square @ square}, rounds)
            exact = flash(q_BHTD.float(), k_BHSD.float(), v_BHSD.float())[0][0].transpose(0, 1)
            error = {
                "ours": float((run().out - exact).abs().max()),
                "torch": float((flash()[0][0].transpose(0, 1).float() - exact).abs().max()),
            }
            flop = 2.0 * dim * heads * length * (length + 1)
            rate = {name: flop / times[name]["min"] / 1e9 for name in ("ours", "torch")}
            rate["mm"] = 2 * 1024**3 / times["mm"]["min"] / 1e9
            rows.append(
                {"case": f"prefill {str(dtype)[6:]} S {length} D {dim} {heads}/{groups}",
                 "seconds": times, "gflops": rate, "error": error,
                 "speedup": times["torch"]["min"] / times["ours"]["min"],
                 "speedup_median": times["torch"]["median"] / times["ours"]["median"],
                 "of_mm": rate["ours"] / rate["mm"]}
            )  # fmt: skip
            last = rows[-1]
            print(
                f"| {last['case']} | {rate['ours']:.0f} GF/s | {last['speedup']:.2f}x flash "
                f"({last['speedup_median']:.2f}x median) | {100 * last['of_mm']:.0f} % of mm | "
                f"{error['ours']:.1e}, torch {error['torch']:.1e} |",
                flush=True,
            )
    return rows


def decode(kernel: CpuKernel, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One query over 32K keys, 32 query and 8 KV heads of 128 dims."""
    heads, groups, dim, keys = 32, 8, 128, 32768
    q, k, v = (
        torch.randn(t, n, dim).to(dtype) for t, n in ((1, heads), (keys, groups), (keys, groups))
    )
    q_BHTD = q.transpose(0, 1)[None]
    k_BGSD, v_BGSD = (x.transpose(0, 1)[None].contiguous() for x in (k, v))
    folded = q.view(1, groups, heads // groups, dim)
    much = torch.randn(64 * 2**20)
    times = race(
        {"ours": ours(kernel, q, k, v, keys - 1),
         "grouped": lambda: sdpa(folded, k_BGSD, v_BGSD),
         "read": lambda: much.max()},
        rounds,
    )  # fmt: skip
    times |= race({"gqa": lambda: sdpa(q_BHTD, k_BGSD, v_BGSD, enable_gqa=True)}, 3)
    rate = {
        "ours": 2 * k.numel() * k.itemsize / times["ours"]["min"] / 1e9,
        "read": much.numel() * 4 / times["read"]["min"] / 1e9,
    }
    row = {
        "case": f"decode {str(dtype)[6:]} {heads}/{groups} D {dim}, {keys} keys",
        "seconds": times, "gb_per_s": rate, "of_read": rate["ours"] / rate["read"],
        "speedup_gqa": times["gqa"]["min"] / times["ours"]["min"],
        "speedup_grouped": times["grouped"]["min"] / times["ours"]["min"],
    }  # fmt: skip
    print(
        f"| {row['case']} | {rate['ours']:.1f} GB/s | {row['speedup_gqa']:.1f}x sdpa gqa, "
        f"{row['speedup_grouped']:.2f}x grouped | {100 * row['of_read']:.0f} % of read | |",
        flush=True,
    )
    return [row]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--only", default="prefill,decode")
    arguments.add_argument("--isa", help="a variant other than the best")
    arguments.add_argument("--json", type=Path)
    args = arguments.parse_args(argv)
    library = load()
    if not isinstance(library, Library):
        raise SystemExit(library)
    torch.set_num_threads(args.threads)
    kernel = CpuKernel(library, args.isa)
    about = machine()
    print(f"{about['machine']}, {kernel.isa}, {args.threads} threads, load {about['load']}")
    print("| case | rate | against torch | of the limit | largest error |")
    print("|---|---|---|---|---|")
    rows = []
    for name, run in (("prefill", prefill), ("decode", decode)):
        if name in args.only.split(","):
            for dtype in (torch.bfloat16, torch.float32):
                rows += run(kernel, dtype, args.rounds)
    finish(
        {"command": command("kernels", sys.argv[1:] if argv is None else argv), **about,
         "isa": kernel.isa, "brgemm": kernel.brgemm, "threads": args.threads, "rows": rows},
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
