"""The ledger of the wire against the formulas of each mode, byte by byte.

Letters: N ranks, M hosts, S keys, T (or B) queries, H query heads, G KV heads, D and V head dims of
keys and of values, e bytes per element, b tokens a block. The formulas are written out here; none
of the code's own size functions is called. All cases of a machine run in one start-up, over groups
of its ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from ds_cp import SamplingParams
from ds_cp.attention import LayerSpec, TreeRoutes
from ds_cp.attention.kernels import choose_kernel
from ds_cp.comm.ledger import Entry
from ds_cp.comm.wire import Group, Prepared, World
from ds_cp.kv.pool import KVPool
from ds_cp.layout import contiguous, positions
from ds_cp.plan import Begin, Chunk, Sampling, StepPlan
from ds_cp.worker.outcome import HEAD
from ds_cp.worker.state import WorkerState, check_item
from ds_cp.worker.step_context import Layers, StepContext
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.steps import Request, Step, decode, prompt
from tests.helpers.ranks import run_ranks, world_group

Entries = dict[str, Entry]  # scheme -> what one rank sent
D, V = 16, 24
HEADS = [(4, 2), (9, 3), (4, 1)]
DTYPES = [(torch.float32, 4), (torch.bfloat16, 2)]
LSE = 4  # bytes of one head's lse, always fp32
BLOCK = 4  # tokens
Spec = tuple[tuple[int, int], int, int]  # (H, G), D, V


@dataclass(frozen=True)
class Case:
    """Requests of one step in one mode, and one layer of it. ``size``: tokens a block."""

    mode: str
    ring_pass: str
    requests: tuple[Request, ...]
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.float32
    size: int = 1
    dims: tuple[int, int] = (D, V)
    window: int | None = None


Batches = Mapping[str, tuple[Sequence[int], Sequence[Case]]]  # name -> members, their cases


def run_batches(world: World, batches: Batches) -> dict[str, list[Entries]]:
    """Per batch, this rank's ledger after each case; a rank that is no member runs nothing.

    The bytes that are handed to ``Group.exchange``, and to ``Group.prepare`` for each start, are
    counted too and must be the same.
    """
    found: dict[str, list[Entries]] = {}
    weighed = [0]
    exchange, prepare, start = Group.exchange, Group.prepare, Prepared.start
    prepared: dict[int, tuple[Prepared, int]] = {}

    def weigh(group: Group, sends: Any, recvs: Any, scheme: str) -> Any:
        weighed[0] += sum(tensor.nbytes for _, tensor in sends)
        return exchange(group, sends, recvs, scheme)

    def weigh_prepared(group: Group, sends: Any, recvs: Any, scheme: str) -> Any:
        made = prepare(group, sends, recvs, scheme)
        prepared[id(made)] = made, sum(tensor.nbytes for _, tensor in sends)
        return made

    def weigh_start(made: Prepared) -> Any:
        weighed[0] += prepared[id(made)][1]
        return start(made)

    Group.exchange = weigh  # type: ignore[method-assign]
    Group.prepare = weigh_prepared  # type: ignore[method-assign]
    Prepared.start = weigh_start  # type: ignore[method-assign]
    for name, (members, cases) in batches.items():
        rest = [r for r in range(world.size) if r not in members]
        group = world.group(name, [list(members), *([rest] if rest else [])])
        found[name] = []
        for case in cases if world.rank in members else []:
            world.ledger.clear()
            weighed[0] = 0
            run_case(group, case)
            found[name].append(world.ledger.schemes())
            assert sum(entry.bytes for entry in found[name][-1].values()) == weighed[0]
    return found


def run_case(group: Group, case: Case) -> None:
    (num_heads, num_kv), (k_dim, v_dim) = case.heads, case.dims
    spec = LayerSpec(num_heads, num_kv, k_dim, 0.25, case.window, v_head_dim=v_dim)
    kernel = choose_kernel("reference", group.device, case.dtype, [spec], case.size, False).kernel
    windows = [None, case.window]
    step = Step(group, case.requests, case.size, case.mode, case.ring_pass, windows, TreeRoutes())
    step.run(spec, kernel, case.dtype)


def entries_of(
    size: int, batches: Batches, hosts: str | None = None
) -> dict[str, list[list[Entries]]]:
    """Per batch and case, the entries of every member."""
    ranks = run_ranks(run_batches, size, batches, hosts=list(hosts) if hosts else None)
    return {
        name: [list(rows) for rows in zip(*(ranks[r][name] for r in members), strict=True)]
        for name, (members, _) in batches.items()
    }


def sent(entries: Sequence[Entries], scheme: str) -> list[int]:
    return [b[scheme].bytes if scheme in b else 0 for b in entries]


def rounds(entries: Sequence[Entries], scheme: str) -> list[int]:
    return [b[scheme].exchanges if scheme in b else 0 for b in entries]


def crossed(entries: Sequence[Entries], scheme: str) -> int:
    """Bytes between hosts, over the job."""
    return sum(b[scheme].inter_host_bytes for b in entries if scheme in b)


def homes(blocks: Sequence[int]) -> list[int]:
    """``blocks[r]`` blocks on rank r, in rank order."""
    return [rank for rank, count in enumerate(blocks) for _ in range(count)]


def step_of(past: Sequence[int], owner: int) -> Request:
    """One new token on ``owner``, in a block of one, over ``past[r]`` earlier tokens on rank r."""
    return decode(sum(past) + 1, [*homes(past), owner], owner, len(past))


def resident(blocks: Sequence[int], owners: Sequence[int], size: int = 1) -> Request:
    """``owners[r]`` new tokens on rank r, the last of those in ``blocks[r]`` blocks there."""
    length = sum(blocks) * size
    return Request(length, tuple(homes(blocks)), contiguous(length - sum(owners), owners))


def cut(request: Request, tokens: int) -> Request:
    """The request without its last ``tokens``, so that its last block is not full."""
    end = request.length - tokens
    q_runs = tuple(
        tuple((at, min(n, end - at)) for at, n in runs if at < end) for runs in request.q_runs
    )
    return replace(request, length=end, q_runs=q_runs)


# --- one host: three ranks, or four of them

KINDS = list(itertools.product(HEADS, DTYPES))
EVEN = [prompt([14] * 3, 1), prompt([14] * 3, 1, layout="contiguous"), resident([14] * 3, [2] * 3)]
UNEVEN = [prompt([9, 4, 1], 1), step_of([7, 2, 4], 1), resident([2, 3, 9], [1, 1, 3])]  # S = 14
# Six whole blocks of four, then 7 tokens in two blocks: S = 24, 22 and 7, in 6, 6 and 2 blocks.
WHOLE = prompt([2] * 3, BLOCK)
PARTLY = [cut(WHOLE, 2), decode(7, [0, 2], owner=2, ranks=3)]
SIX = tuple(step_of([5 + i, 8, 2], owner=i % 3) for i in range(6))  # B = 6, two a rank
MIXED = (prompt([9, 4, 1], 1), step_of([7, 2, 4], owner=1), step_of([1, 1, 1], owner=2))
HOLES = [prompt([8, 0, 8, 8], 1), step_of([6, 0, 5, 4], owner=3), step_of([6, 0, 5, 0], owner=2)]
EXAMPLE = resident([4] * 4, [1] * 4, size=64)
MODES = [("ring", "kv"), ("ring", "q"), ("tree", "kv")]


def one_host_batches() -> Batches:
    three, four = (0, 1, 2), (0, 1, 2, 3)
    bf16 = torch.bfloat16
    single = [(one,) for one in EVEN + UNEVEN]

    def in_every_kind(
        mode: str, ring_pass: str, steps: Sequence[tuple[Request, ...]]
    ) -> list[Case]:
        return [
            Case(mode, ring_pass, x, heads, dtype) for heads, (dtype, _) in KINDS for x in steps
        ]

    blocks = [(WHOLE,), *((one,) for one in PARTLY)]
    return {
        "local": (three, in_every_kind("local", "kv", [(resident([0, 9, 0], [0, 3, 0]),)])),
        "kv": (three, in_every_kind("ring", "kv", single)),
        "blocks": (
            three,
            [replace(case, size=BLOCK) for case in in_every_kind("ring", "kv", blocks)],
        ),
        "q": (three, in_every_kind("ring", "q", single)),
        "tree": (three, in_every_kind("tree", "kv", [SIX, (EVEN[0],)])),
        "mixed": (three, [Case(*mode, MIXED, (4, 2), bf16) for mode in MODES]),
        "holes": (four, [Case(*mode, (x,)) for x in HOLES for mode in MODES]),
        "example": (
            four,
            [Case(*mode, (EXAMPLE,), (32, 8), bf16, 64, (128, 128)) for mode in MODES],
        ),
        "windows": (four, [case for _, case in windowed()]),
    }


@pytest.fixture(scope="module")
def one_host() -> dict[str, list[list[Entries]]]:
    return entries_of(4, one_host_batches())


def test_local_sends_nothing(one_host: dict[str, list[list[Entries]]]) -> None:
    assert len(one_host["local"]) == 6
    for entries in one_host["local"]:
        assert entries == [{}, {}, {}]


def test_ring_pass_kv(one_host: dict[str, list[list[Entries]]]) -> None:
    """Even shards: (N-1)/N * S*G*(D+V)*e a rank; uneven: (N-1) * S*G*(D+V)*e over all of them."""
    cases = iter(one_host["kv"])
    for (_, num_kv), (_, e) in KINDS:
        for _ in EVEN:
            entries = next(cases)
            assert sent(entries, "ring_pass_kv") == [2 * 42 * num_kv * (D + V) * e // 3] * 3
        for _ in UNEVEN:
            entries = next(cases)
            assert sum(sent(entries, "ring_pass_kv")) == 2 * 14 * num_kv * (D + V) * e
    for entries in one_host["kv"]:
        assert all(set(b) == {"ring_pass_kv"} for b in entries)
        assert rounds(entries, "ring_pass_kv") == [2, 2, 2]
    # N = 3, S = 42, G = 2, D = 16, V = 24, fp32
    assert sent(one_host["kv"][0], "ring_pass_kv") == [8960] * 3


def test_ring_pass_kv_moves_whole_blocks(one_host: dict[str, list[list[Entries]]]) -> None:
    """The last block counts in full: (N-1) * ceil(S/b)*b * G*(D+V)*e over all ranks."""
    cases = iter(one_host["blocks"])
    for (_, num_kv), (_, e) in KINDS:
        for stored in (24, 24, 8):  # of 24, 22 and 7 tokens
            entries = next(cases)
            n = 3 if stored == 24 else 2  # the last one has no part on rank 1
            moved = (n - 1) * stored * num_kv * (D + V) * e
            assert sum(sent(entries, "ring_pass_kv")) == moved
            assert max(rounds(entries, "ring_pass_kv")) == n - 1
    # N = 3, two blocks of 4 a rank, G = 2, fp32: two hops of 2 * 4 * 2 * (16 + 24) * 4
    assert sent(one_host["blocks"][0], "ring_pass_kv") == [5120] * 3


def test_ring_pass_q(one_host: dict[str, list[list[Entries]]]) -> None:
    """(N-1)/N * T*H*D*e out in N-1 exchanges, (N-1)/N * T*H*(V*e+4) back in one."""
    cases = iter(one_host["q"])
    for (num_heads, _), (_, e) in KINDS:
        for tokens in (42, 42, 6, 14, 1, 5):
            entries = next(cases)
            out, back = sent(entries, "ring_pass_q"), sent(entries, "ring_pass_q_partials")
            if tokens in (42, 6):
                assert out == [2 * tokens * num_heads * D * e // 3] * 3
                assert back == [2 * tokens * num_heads * (V * e + LSE) // 3] * 3
            assert sum(out) == 2 * tokens * num_heads * D * e
            assert sum(back) == 2 * tokens * num_heads * (V * e + LSE)
            assert max(rounds(entries, "ring_pass_q")) == 2
            assert max(rounds(entries, "ring_pass_q_partials")) == 1
            assert all(set(b) <= {"ring_pass_q", "ring_pass_q_partials"} for b in entries)
    # N = 3, T = 42, H = 4, D = 16, V = 24, fp32
    assert sent(one_host["q"][0], "ring_pass_q") == [7168] * 3
    assert sent(one_host["q"][0], "ring_pass_q_partials") == [11200] * 3


def test_tree_on_one_host(one_host: dict[str, list[list[Entries]]]) -> None:
    """(N-1)/N * B*H*(V*e+4) of partials and (N-1)/N * B*H*D*e of queries, one exchange each."""
    cases = iter(one_host["tree"])
    for (num_heads, _), (_, e) in KINDS:
        for tokens in (6, 42):
            entries = next(cases)
            assert sent(entries, "tree_q") == [2 * tokens * num_heads * D * e // 3] * 3
            partials = 2 * tokens * num_heads * (V * e + LSE) // 3
            assert sent(entries, "tree_partials") == [partials] * 3
            assert rounds(entries, "tree_q") == rounds(entries, "tree_partials") == [1, 1, 1]
            assert all(set(b) == {"tree_q", "tree_partials"} for b in entries)
    # N = 3, B = 6, H = 4, D = 16, V = 24, fp32
    assert sent(one_host["tree"][0], "tree_q") == [1024] * 3
    assert sent(one_host["tree"][0], "tree_partials") == [1600] * 3


def test_several_items_share_the_same_exchanges(one_host: dict[str, list[list[Entries]]]) -> None:
    """Bytes of a step's items add up, rounds do not."""
    keys, tokens, num_heads, num_kv, e = 14 + 14 + 4, 14 + 1 + 1, 4, 2, 2
    kv, q, tree = one_host["mixed"]
    assert sum(sent(kv, "ring_pass_kv")) == 2 * keys * num_kv * (D + V) * e
    assert rounds(kv, "ring_pass_kv") == [2, 2, 2]
    assert sum(sent(q, "ring_pass_q")) == 2 * tokens * num_heads * D * e
    assert sum(sent(q, "ring_pass_q_partials")) == 2 * tokens * num_heads * (V * e + LSE)
    assert rounds(q, "ring_pass_q_partials") == [1, 1, 1]
    assert sum(sent(tree, "tree_q")) == 2 * tokens * num_heads * D * e
    assert sum(sent(tree, "tree_partials")) == 2 * tokens * num_heads * (V * e + LSE)
    assert rounds(tree, "tree_q") == rounds(tree, "tree_partials") == [1, 1, 1]


def test_a_span_smaller_than_the_group(one_host: dict[str, list[list[Entries]]]) -> None:
    """N is the size of the span: of four ranks, 1 has nothing (nor has 3 later) and is silent."""
    num_heads, num_kv, e = 4, 2, 4
    sizes = [(3, 24, 24), (3, 16, 1), (2, 12, 1)]  # N, S, T
    assert all(entries[1] == {} for entries in one_host["holes"])
    assert all(entries[3] == {} for entries in one_host["holes"][6:])
    for i, (n, keys, tokens) in enumerate(sizes):
        kv, q, tree = one_host["holes"][3 * i : 3 * i + 3]
        queries, partials = tokens * num_heads * D * e, tokens * num_heads * (V * e + LSE)
        assert sum(sent(kv, "ring_pass_kv")) == (n - 1) * keys * num_kv * (D + V) * e
        assert max(rounds(kv, "ring_pass_kv")) == n - 1
        assert sum(sent(q, "ring_pass_q")) == (n - 1) * queries
        assert sum(sent(q, "ring_pass_q_partials")) == (n - 1) * partials
        assert sum(sent(tree, "tree_q")) == (n - 1) * queries
        assert sum(sent(tree, "tree_partials")) == (n - 1) * partials
    # N = 3, S = 24, G = 2, D = 16, V = 24, fp32
    assert sent(one_host["holes"][0], "ring_pass_kv") == [5120, 0, 5120, 5120]


def test_the_example_of_the_formulas(one_host: dict[str, list[list[Entries]]]) -> None:
    """H 32, G 8, D 128, bf16, N 4. The example has S = 128K; here it is 1024, an 128th of that, and
    four queries, one a rank, where it has one: so 6.2 KB of partials a rank come four times."""
    kv, q, tree = one_host["example"]
    assert sent(kv, "ring_pass_kv") == [3_145_728] * 4  # 402,653,184 / 128
    assert sent(tree, "tree_partials") == [4 * 6_240] * 4
    assert sent(q, "ring_pass_q") == [24_576] * 4
    assert sent(q, "ring_pass_q_partials") == [24_960] * 4  # together 49,536: the 49.5 KB


# --- windows: what is seen is what travels

WINDOWS = (1, 3, 5, 11, 30)
SIGHTS = [
    (prompt([2] * 4, BLOCK),),
    (prompt([2, 1, 1, 2], BLOCK, past=2), cut(prompt([1] * 4, BLOCK, layout="contiguous"), 3)),
    (decode(25, [0, 1, 2, 3, 0, 1, 2], owner=2, ranks=4), decode(8, [3, 0], owner=0, ranks=4)),
    tuple(decode(17 + i, [i % 4, 1, 2, 3, 0], owner=i % 4, ranks=4) for i in range(4)),
]


def windowed() -> list[tuple[int, Case]]:
    return [
        (window, Case(mode, ring_pass, requests, size=BLOCK, window=window))
        for requests in SIGHTS
        for window in WINDOWS
        for mode, ring_pass in MODES
    ]


def seen_blocks(request: Request, size: int, window: int) -> list[list[set[int]]]:
    """Pair by pair of query and key: per home and owner, the blocks there that are seen."""
    ranks = len(request.q_runs)
    found: list[list[set[int]]] = [[set() for _ in range(ranks)] for _ in range(ranks)]
    for owner, runs in enumerate(request.q_runs):
        for q in positions(runs):
            for key in range(max(0, q - window + 1), q + 1):
                found[request.homes[key // size]][owner].add(key // size)
    return found


def round_trip(counts: Sequence[int], members: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Of each rank what it sends, in the unit of ``counts``, and in how many hops, when every
    member's ``counts`` pass every member."""
    found, n = [(0, 0)] * size, len(members)
    for place, rank in enumerate(members):
        here = [counts[members[(place - step) % n]] for step in range(n)]
        hops = sum(bool(here[step] or here[step + 1]) for step in range(n - 1))
        found[rank] = sum(here[: n - 1]), hops
    return found


def test_a_windowed_layer_moves_only_what_is_seen(one_host: dict[str, list[list[Entries]]]) -> None:
    """Ring pass-KV: rank r sends to s each of its blocks in which a query of s sees a key, once.
    Pass-Q and tree: each owner's rows go to the ranks that hold such a key, and come back. In one
    exchange, and ranks with nothing to say or hear have none. In a ring, requests of which the
    window hides nothing go round as without a window."""
    num_heads, num_kv, e, n = 4, 2, 4, 4
    silent = mixed = 0
    for (window, case), entries in zip(windowed(), one_host["windows"], strict=True):
        seen = [seen_blocks(request, BLOCK, window) for request in case.requests]
        end = max(request.length for request in case.requests)
        rows = [[len(positions(runs)) for runs in request.q_runs] for request in case.requests]
        pairs = [(r, s) for r in range(n) for s in range(n) if r != s]
        if window >= end:
            continue  # it hides nothing: as without a window
        whole = [request.length <= window for request in case.requests]
        if case.mode == "tree":
            whole = [False] * len(whole)
        going = [request for request, short in zip(case.requests, whole, strict=True) if short]
        held = [[homes.count(r) for r in range(n)] for homes in (x.homes for x in going)]
        asked_round = [[len(positions(runs)) for runs in x.q_runs] for x in going]
        members = [r for r in range(n) if any(h[r] or a[r] for h, a in zip(held, asked_round, strict=True))]
        seen = [x for x, short in zip(seen, whole, strict=True) if not short]
        rows = [x for x, short in zip(rows, whole, strict=True) if not short]
        mixed += bool(going)
        if case.ring_pass == "kv" and case.mode == "ring":
            moved = {pair: sum(len(x[pair[0]][pair[1]]) for x in seen) for pair in pairs}
            more = round_trip([sum(h[r] for h in held) for r in range(n)], members, n)
            for rank in range(n):
                blocks = sum(moved[rank, s] for s in range(n) if s != rank) + more[rank][0]
                assert sent(entries, "ring_pass_kv")[rank] == blocks * BLOCK * num_kv * (D + V) * e
                busy = any(count and rank in pair for pair, count in moved.items())
                assert rounds(entries, "ring_pass_kv")[rank] == busy + more[rank][1]
                silent += not busy
            continue
        names = (
            ("tree_q", "tree_partials")
            if case.mode == "tree"
            else ("ring_pass_q", "ring_pass_q_partials")
        )
        asked = {
            (r, s): sum(rows[i][s] for i, x in enumerate(seen) if x[r][s]) for r, s in pairs
        }  # rows of s that r answers
        more = round_trip([sum(a[r] for a in asked_round) for r in range(n)], members, n)
        for rank in range(n):
            out = sum(asked[r, rank] for r in range(n) if r != rank)
            back = sum(asked[rank, s] for s in range(n) if s != rank)
            busy = bool(out or back)
            answers, answered = (
                sum(a[x] for x, y in others
                    for h, a in zip(held, asked_round, strict=True) if h[y])
                for others in (
                    [(s, rank) for s in range(n) if s != rank],
                    [(rank, s) for s in range(n) if s != rank],
                )
            )  # fmt: skip
            assert sent(entries, names[0])[rank] == (out + more[rank][0]) * num_heads * D * e
            assert sent(entries, names[1])[rank] == (back + answers) * num_heads * (V * e + LSE)
            assert rounds(entries, names[0])[rank] == busy + more[rank][1]
            assert rounds(entries, names[1])[rank] == busy + bool(answers or answered)
    assert silent and mixed  # some rank had no part in some exchange; some went round


# --- several hosts


def spread(size: int) -> list[Case]:
    """Requests whose keys are on every one of ``size`` ranks: B = 6, then 24, then 3 + 24."""
    some = tuple(step_of([3 + (r + i) % 4 for r in range(size)], owner=i % size) for i in range(6))
    long = prompt([24 // size] * (size - 1) + [24 - 24 // size * (size - 1)], 1)
    return [
        Case("tree", "kv", items, heads, dtype)
        for items in (some, (long,), (*some[:3], long))
        for heads in HEADS[:2]
        for dtype, _ in DTYPES
    ]


def even_ring(size: int) -> list[Case]:
    return [Case("ring", "kv", (prompt([6] * size, 1),), (4, 2), torch.float32)]


PARTIAL_HOSTS = (step_of([4, 3, 2, 5, 0, 0], owner=0), step_of([1, 1, 0, 6, 0, 0], owner=3))
TWO_HOSTS = {
    "ab": (0, 4),
    "aab": (0, 1, 4),
    "abbb": (0, 4, 5, 6),
    "aabb": (0, 1, 4, 5),
    "abab": (0, 4, 1, 5),
    "aaaabbbb": (0, 1, 2, 3, 4, 5, 6, 7),
}  # members in a job of four ranks on host a and four on b
THREE_HOSTS = {"abc": (0, 2, 4), "aabc": (0, 1, 2, 4), "aabbcc": (0, 1, 2, 3, 4, 5)}


def host_batches(groups: Mapping[str, tuple[int, ...]]) -> Batches:
    trees = {name: (ranks, spread(len(ranks))) for name, ranks in groups.items()}
    rings = {f"ring {name}": (ranks, even_ring(len(ranks))) for name, ranks in groups.items()}
    return {**trees, **rings}


@pytest.fixture(scope="module")
def hosts() -> dict[str, list[list[Entries]]]:
    two = entries_of(8, host_batches(TWO_HOSTS), "aaaabbbb")
    everybody = range(6)
    partly = {"partly": (everybody, [Case("tree", "kv", PARTIAL_HOSTS, (4, 2), torch.float32)])}
    three = entries_of(6, {**host_batches(THREE_HOSTS), **partly}, "aabbcc")
    return {**two, **three}


@pytest.mark.parametrize("name", [*TWO_HOSTS, *THREE_HOSTS])
def test_tree_bytes_between_hosts_do_not_grow_with_the_ranks(
    hosts: dict[str, list[list[Entries]]], name: str
) -> None:
    """Over the job, whatever the ranks per host: (M-1)*B*H*(V*e+4) of partials and (M-1)*B*H*D*e
    of queries, each query once per other host, in at most two rounds."""
    size, others = len(name), len(set(name)) - 1
    cases = iter(hosts[name])
    for tokens, (num_heads, _), (_, e) in itertools.product((6, 24, 27), HEADS[:2], DTYPES):
        entries = next(cases)
        assert crossed(entries, "tree_partials") == others * tokens * num_heads * (V * e + LSE)
        assert crossed(entries, "tree_q") == others * tokens * num_heads * D * e
        # Over all links every rank but the owner gets each query and answers it, once.
        assert sum(sent(entries, "tree_q")) == (size - 1) * tokens * num_heads * D * e
        partials = (size - 1) * tokens * num_heads * (V * e + LSE)
        assert sum(sent(entries, "tree_partials")) == partials
        assert max(rounds(entries, "tree_q")) <= 2 and max(rounds(entries, "tree_partials")) <= 2


def test_tree_sends_nothing_to_hosts_without_keys(hosts: dict[str, list[list[Entries]]]) -> None:
    """Keys on hosts a and b only: host c hears nothing and says nothing."""
    [entries] = hosts["partly"]
    assert entries[4] == entries[5] == {}
    assert crossed(entries, "tree_q") == 1 * 2 * 4 * D * 4
    assert crossed(entries, "tree_partials") == 1 * 2 * 4 * (V * 4 + LSE)


@pytest.mark.parametrize("name", [*TWO_HOSTS, *THREE_HOSTS])
def test_ring_crosses_each_border_once_a_round(
    hosts: dict[str, list[list[Entries]]], name: str
) -> None:
    """Of a ring's N links M go to another host, and each carries (N-1)/N * S*G*(D+V)*e."""
    [entries] = hosts[f"ring {name}"]
    per_rank = (len(name) - 1) * 6 * 2 * (D + V) * 4
    assert sent(entries, "ring_pass_kv") == [per_rank] * len(name)
    assert crossed(entries, "ring_pass_kv") == len(set(name)) * per_rank


# --- the engine: one step, then whole requests


def ship(world: World) -> list[Entries]:
    """Two layers, two requests: 12 new tokens owned 4 / 4 / 4 with homes 12 / 0 / 0, and 9 new ones
    over 5 earlier, owned 3 / 3 / 3 with homes 0 / 5 / 4."""
    group, entries = world_group(world), []
    requests = [
        _shipped(0, [], [4, 4, 4], [12, 0, 0]),
        _shipped(1, [2, 3, 0], [3, 3, 3], [0, 5, 4]),
    ]
    begins, chunks = zip(*requests, strict=True)
    plan = StepPlan(1, begins=begins, chunks=chunks)
    for dtype, _ in DTYPES:
        layers = [LayerSpec(4, 2, D, 0.25)] * 2
        pool = KVPool(layers, 64, 1, dtype, group.device)
        kernel = choose_kernel("reference", group.device, dtype, layers, 1, False).kernel
        work = WorkerState(group.rank, block_size=1).apply(plan)
        for item in work.items:
            check_item(item)
        step = StepContext(work, Layers(layers, pool, kernel, group))
        assert step.num_rows == 4 + 3
        world.ledger.clear()
        for layer in range(2):
            q = torch.randn(1, 4, step.num_rows, D).to(dtype)
            k, v = (torch.randn(1, 2, step.num_rows, D).to(dtype) for _ in "kv")
            step.attend(layer, q, k, v)
        entries.append(world.ledger.schemes())
    keys_of_blocks(group)
    return entries


def keys_of_blocks(group: Group) -> None:
    """12 tokens after 8, owned 5 / 4 / 3, whose three blocks of four are on ranks 0 and 2: every
    key and value is at its place there."""
    layers = [LayerSpec(4, 2, D, 0.25, v_head_dim=V)]
    pool = KVPool(layers, 16, 4, torch.float32, group.device)
    kernel = choose_kernel("reference", group.device, torch.float32, layers, 4, False).kernel
    begin, chunk = _shipped(0, [1, 1, 0], [5, 4, 3], [2, 0, 1], size=4)
    work = WorkerState(group.rank, block_size=4).apply(
        StepPlan(1, begins=(begin,), chunks=(chunk,))
    )
    step = StepContext(work, Layers(layers, pool, kernel, group))
    at = step.positions[0].float().view(1, 1, -1, 1)
    step.attend(
        0, torch.zeros(1, 4, step.num_rows, D), at.expand(1, 2, -1, D), -at.expand(1, 2, -1, V)
    )
    [item] = work.items
    for number, first, keys in item.sequence.table.blocks_on(group.rank):
        if first >= 8:
            k, v = pool.layer(0).gather(torch.tensor([number]))
            want = torch.arange(first, first + keys).float().view(-1, 1, 1)
            assert torch.equal(k, want.expand_as(k)) and torch.equal(v, -want.expand_as(v))


def _shipped(
    request: int, past: list[int], owners: list[int], homes: list[int], size: int = 1
) -> tuple[Begin, Chunk]:
    """A request with ``past[r]`` blocks stored on rank r, and a chunk; rank r computes
    ``owners[r]`` tokens and stores ``homes[r]`` blocks, all in rank order."""
    at = itertools.count(32 * request)
    earlier, new = (
        tuple((rank, next(at)) for rank, count in enumerate(counts) for _ in range(count))
        for counts in (past, homes)
    )
    start = size * len(earlier)
    tokens = tuple(range(1, start + sum(owners) + 1))
    q_runs = contiguous(start, owners)
    return (
        Begin(request, tokens, len(tokens), earlier, start, Sampling()),
        Chunk(request, "ring", "kv", tuple(enumerate(q_runs)), new, False),
    )


def test_ship_kv_costs_one_kv_per_moved_token() -> None:
    """2*G*D*e per layer for each token whose home is not its owner, in one exchange a layer."""
    # Request 0: ranks 1 and 2 move 4 each. Request 1: positions 5-7, 8-10, 11-13 are owned by ranks
    # 0, 1, 2 and live on rank 1 (5-9) and rank 2 (10-13): rank 0 moves 3, rank 1 moves 1.
    for (_, e), *entries in zip(DTYPES, *run_ranks(ship, 3), strict=True):
        one = 2 * 2 * D * e  # K and V of a token: 2 KV heads
        layers = 2
        assert sent(entries, "ship_kv") == [layers * 3 * one, layers * 5 * one, layers * 4 * one]
        assert max(rounds(entries, "ship_kv")) <= 2 * layers  # one per request and layer


SHORT = [[1, 2, 3, 4, 5], [7] * 20, list(range(100, 128)), [9]]
LONG = [[(7 * i) % 128 for i in range(96)]]
NEW = 6
LAYERS = 2  # of the tiny model, whose H, G and D are 4, 2 and 16, in fp32
ENGINES: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "auto": (SHORT, {"kv_cache": {"tokens_per_rank": 64, "block_size": 8}}),
    "local": (
        SHORT,
        {
            "kv_cache": {"tokens_per_rank": 64, "block_size": 8},
            "context_parallel": {"mode": "local"},
        },
    ),
    "spanning": (
        LONG,
        {
            "kv_cache": {"tokens_per_rank": 64, "block_size": 8, "placement": "balanced"},
            "context_parallel": {"local_threshold": 8, "ring_pass": "kv"},
        },
    ),
    "unequal": (
        LONG,
        {
            "kv_cache": {"tokens_per_rank": [128, 32, 32], "block_size": 8},
            "context_parallel": {"local_threshold": 8, "layout": "contiguous"},
        },
    ),
}


def generate(world: World) -> dict[str, tuple[list[list[int]], Entries]]:
    """Greedy tokens (rank 0) and this rank's entries of each engine."""
    found = {}
    for name, (prompts, config) in ENGINES.items():
        engine = engine_on(world, tiny_llama(), config)
        world.ledger.clear()
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=NEW))
        found[name] = ([list(o.outputs[0].token_ids) for o in outputs], world.ledger.schemes())
    return found


def greedy(prompts: list[list[int]]) -> list[list[int]]:
    """transformers' own tokens, every step from the whole sequence."""
    model = tiny_llama()
    out = []
    for given in prompts:
        ids = list(given)
        with torch.inference_mode():
            for _ in range(NEW):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        out.append(ids[len(given) :])
    return out


@pytest.fixture(scope="module")
def engines() -> dict[str, list[Entries]]:
    """Every engine's entries, by rank, once its tokens have been found right."""
    ranks = run_ranks(generate, 3)
    for name, (prompts, _) in ENGINES.items():
        assert ranks[0][name][0] == greedy(prompts), name
    return {name: [rank[name][1] for rank in ranks] for name in ENGINES}


@pytest.mark.parametrize("name", ["auto", "local"])
def test_local_requests_put_nothing_on_the_wire_in_attention(
    engines: dict[str, list[Entries]], name: str
) -> None:
    """Whichever rank they live on: plans go out, tokens come back, and that is all."""
    entries = engines[name]
    assert all(set(b) <= {"plan", "result"} for b in entries)
    assert sent(entries, "plan")[1:] == [0, 0] and sent(entries, "result")[0] == 0
    # Four requests of NEW tokens, token and log-probability in fp64 each; some live elsewhere. With
    # each step's come the times of its rank.
    elsewhere = [n for n in sent(entries, "result") if n]
    assert all(n % (NEW * 2 * 8) == 0 for n in elsewhere)
    requests = [n // (NEW * 2 * 8) - HEAD for n in elsewhere]
    assert min(requests) >= 1 and sum(requests) <= 4, requests


def test_spanning_requests_cost_the_formulas_in_every_layer(
    engines: dict[str, list[Entries]],
) -> None:
    """96 tokens in three even shares by ring; then NEW - 1 decode steps by tree."""
    entries, e = engines["spanning"], 4
    assert sent(entries, "ring_pass_kv") == [LAYERS * 2 * 2 * 96 * 2 * D * e // 3] * 3
    assert rounds(entries, "ring_pass_kv") == [LAYERS * 2] * 3
    steps = NEW - 1
    assert sum(sent(entries, "tree_q")) == steps * LAYERS * 2 * 4 * D * e
    assert sum(sent(entries, "tree_partials")) == steps * LAYERS * 2 * 4 * (D * e + LSE)
    assert max(rounds(entries, "tree_q")) == max(rounds(entries, "tree_partials")) == steps * LAYERS
    attention = {"ring_pass_kv", "tree_q", "tree_partials"}
    # Every token is drawn where the next one is computed, so none of them travels either.
    assert all(set(b) <= {"plan", "result"} | attention for b in entries)


def test_kv_travels_home_once(engines: dict[str, list[Entries]]) -> None:
    """All 96 live on rank 0 and are computed 32 / 32 / 32: 64 of them travel."""
    one = 2 * 2 * D * 4
    assert sent(engines["unequal"], "ship_kv") == [0, LAYERS * 32 * one, LAYERS * 32 * one]


def test_a_drawn_token_travels_to_who_computes_it(engines: dict[str, list[Entries]]) -> None:
    """The prompt's last token is computed on rank 2, all decoding on rank 0: one int64, once."""
    assert sent(engines["unequal"], "next_token") == [0, 0, 8]
