"""The books of the wire against the formulas of FORMULAS.md, byte by byte.

Letters: N ranks, M hosts, S keys, T (or B) queries, H query heads, G KV heads, D head dim, e bytes per
element. The formulas are written out here; none of the code's own size functions is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ds_cp import SamplingParams
from ds_cp.attention import LayerSpec, Span, get_kernel, make_mode
from ds_cp.comm.ledger import Entry
from ds_cp.comm.wire import World
from ds_cp.engine.plan import Item, Shard, StepPlan
from ds_cp.engine.step import StepContext
from ds_cp.kv.pool import KVPool
from ds_cp.layout import Runs, assign, contiguous, total
from tests.engines import engine_on, tiny_llama
from tests.ranks import run_ranks, world_group

Books = dict[str, Entry]  # scheme -> what one rank sent
D = 16
HEADS = [(4, 2), (9, 3), (4, 1)]
DTYPES = [(torch.float32, 4), (torch.bfloat16, 2)]
LSE = 4  # bytes of one head's lse, always fp32


@dataclass(frozen=True)
class Case:
    """Items of one step in one mode. ``dim``: D."""

    mode: str
    ring_pass: str
    items: tuple[Span, ...]
    heads: tuple[int, int]
    dtype: torch.dtype
    dim: int = D


def run_cases(world: World, cases: Sequence[Case]) -> list[Books]:
    """What this rank's books say after each case."""
    group, books = world_group(world), []
    for case in cases:
        (num_heads, num_kv), dim = case.heads, case.dim
        spec = LayerSpec(num_heads, num_kv, dim, 0.25)
        q, k, v = [], [], []
        for span in case.items:
            rows, keys = total(span.q_runs[group.rank]), total(span.k_runs[group.rank])
            q.append(torch.randn(rows, num_heads, dim).to(case.dtype))
            k.append(torch.randn(keys, num_kv, dim).to(case.dtype))
            v.append(torch.randn(keys, num_kv, dim).to(case.dtype))
        _, kernel = get_kernel("sdpa", group.device, case.dtype)
        mode = make_mode(case.mode, case.ring_pass, case.items, group)
        world.ledger.clear()
        out = mode(q, k, v, kernel, spec)
        assert [part.out.shape for part in out] == [x.shape for x in q]
        books.append(world.ledger.schemes())
    return books


def books_of(size: int, cases: Sequence[Case], hosts: str | None = None) -> list[list[Books]]:
    """Per case, the books of every rank."""
    per_rank = run_ranks(run_cases, size, cases, hosts=list(hosts) if hosts else None)
    return [list(rows) for rows in zip(*per_rank, strict=True)]


def sent(books: list[Books], scheme: str) -> list[int]:
    return [b[scheme].bytes if scheme in b else 0 for b in books]


def rounds(books: list[Books], scheme: str) -> list[int]:
    return [b[scheme].exchanges if scheme in b else 0 for b in books]


def crossed(books: list[Books], scheme: str) -> int:
    """Bytes between hosts, over the job."""
    return sum(b[scheme].inter_host_bytes for b in books if scheme in b)


def prefill(size: int, counts: Sequence[int], layout: str = "zigzag") -> Span:
    """A new prompt, ``counts[r]`` tokens on rank r."""
    runs = assign(layout, 0, counts, 1)
    assert len(runs) == size
    return Span(runs, runs)


def decode(past: Sequence[int], owner: int) -> Span:
    """One token on ``owner``, over ``past[r]`` earlier tokens on rank r (its own KV included)."""
    at = sum(past)
    earlier = contiguous(0, past)
    q_runs: list[Runs] = [()] * len(past)
    q_runs[owner] = ((at, 1),)
    keys = [runs + q for runs, q in zip(earlier, q_runs, strict=True)]
    return Span(tuple(q_runs), tuple(keys))


def resident(past: Sequence[int], owners: Sequence[int]) -> Span:
    """``owners[r]`` new tokens on rank r, whose own KV lies among the ``past[r]`` keys of rank r."""
    start = sum(past) - sum(owners)
    return Span(contiguous(start, owners), contiguous(0, past))


# --- one host


def test_local_sends_nothing() -> None:
    spans = (Span((((0, 9),),) * 3, (((0, 9),),) * 3), Span((((4, 1),),) * 3, (((0, 5),),) * 3))
    cases = [Case("local", "kv", spans, heads, dtype) for heads in HEADS for dtype, _ in DTYPES]
    for books in books_of(3, cases):
        assert books == [{}, {}, {}]


def test_ring_pass_kv() -> None:
    """Even shards: (N-1)/N * 2*S*G*D*e a rank; uneven: (N-1) * 2*S*G*D*e over all of them."""
    even, uneven, cases = [], [], []
    for heads, (dtype, e) in itertools.product(HEADS, DTYPES):
        for layout in ("zigzag", "contiguous"):
            cases.append(Case("ring", "kv", (prefill(3, [14] * 3, layout),), heads, dtype))
            even.append(2 * 2 * 42 * heads[1] * D * e // 3)
            uneven.append(0)
        for span, keys in (
            (prefill(3, [9, 4, 1]), 14),
            (decode([7, 2, 4], owner=1), 14),
            (resident([20, 3, 11], owners=[1, 1, 3]), 34),
        ):
            cases.append(Case("ring", "kv", (span,), heads, dtype))
            even.append(0)
            uneven.append(2 * 2 * keys * heads[1] * D * e)
    for books, per_rank, job in zip(books_of(3, cases), even, uneven, strict=True):
        assert all(set(b) == {"ring_pass_kv"} for b in books)
        assert rounds(books, "ring_pass_kv") == [2, 2, 2]
        if per_rank:
            assert sent(books, "ring_pass_kv") == [per_rank] * 3
        else:
            assert sum(sent(books, "ring_pass_kv")) == job
    # one of them as a number: N = 3, S = 42, G = 2, D = 16, fp32
    assert even[0] == 7168


def test_ring_pass_q() -> None:
    """(N-1)/N * T*H*D*e out in N-1 exchanges, (N-1)/N * T*H*(D*e+4) back in one."""
    cases, want = [], []
    for heads, (dtype, e) in itertools.product(HEADS, DTYPES):
        num_heads = heads[0]
        for span, tokens, even in (
            (prefill(3, [14] * 3), 42, True),
            (resident([30, 8, 9], owners=[2] * 3), 6, True),
            (prefill(3, [9, 4, 1]), 14, False),
            (decode([7, 2, 4], owner=1), 1, False),
        ):
            cases.append(Case("ring", "q", (span,), heads, dtype))
            out = 2 * tokens * num_heads * D * e
            back = 2 * tokens * num_heads * (D * e + LSE)
            want.append((out, back, even))
    for books, (out, back, even) in zip(books_of(3, cases), want, strict=True):
        for scheme, job in (("ring_pass_q", out), ("ring_pass_q_partials", back)):
            assert sum(sent(books, scheme)) == job
            assert max(rounds(books, scheme)) == (2 if scheme == "ring_pass_q" else 1)
            if even:
                assert sent(books, scheme) == [job // 3] * 3
        assert all(set(b) <= {"ring_pass_q", "ring_pass_q_partials"} for b in books)
    assert want[0][:2] == (21504, 22848)  # T = 42, H = 4, D = 16, fp32


def test_tree_on_one_host() -> None:
    """(N-1)/N * B*H*(D*e+4) of partials and (N-1)/N * B*H*D*e of queries, one exchange each."""
    cases, want = [], []
    for heads, (dtype, e) in itertools.product(HEADS, DTYPES):
        spans = tuple(decode([5 + i, 8, 2], owner=i % 3) for i in range(6))  # B = 6, two a rank
        for items, tokens in ((spans, 6), ((prefill(3, [14] * 3),), 42)):
            cases.append(Case("tree", "kv", items, heads, dtype))
            q, partials = 2 * tokens * heads[0] * D * e, 2 * tokens * heads[0] * (D * e + LSE)
            want.append((q // 3, partials // 3))
    for books, (q, partials) in zip(books_of(3, cases), want, strict=True):
        assert sent(books, "tree_q") == [q] * 3
        assert sent(books, "tree_partials") == [partials] * 3
        assert rounds(books, "tree_q") == rounds(books, "tree_partials") == [1, 1, 1]
        assert all(set(b) == {"tree_q", "tree_partials"} for b in books)


def test_several_items_add_up_in_the_same_exchanges() -> None:
    """A step's items share every message: bytes add up, rounds do not."""
    spans = (prefill(3, [9, 4, 1]), decode([7, 2, 4], owner=1), decode([1, 1, 1], owner=2))
    keys, tokens, (num_heads, num_kv) = 14 + 14 + 4, 14 + 1 + 1, (4, 2)
    cases = [
        Case(mode, pass_, spans, (num_heads, num_kv), torch.bfloat16)
        for mode, pass_ in (("ring", "kv"), ("ring", "q"), ("tree", "kv"))
    ]
    kv, q, tree = books_of(3, cases)
    assert sum(sent(kv, "ring_pass_kv")) == 2 * 2 * keys * num_kv * D * 2
    assert rounds(kv, "ring_pass_kv") == [2, 2, 2]
    assert sum(sent(q, "ring_pass_q")) == 2 * tokens * num_heads * D * 2
    assert sum(sent(q, "ring_pass_q_partials")) == 2 * tokens * num_heads * (D * 2 + LSE)
    assert rounds(q, "ring_pass_q_partials") == [1, 1, 1]
    assert sum(sent(tree, "tree_q")) == 2 * tokens * num_heads * D * 2
    assert sum(sent(tree, "tree_partials")) == 2 * tokens * num_heads * (D * 2 + LSE)
    assert rounds(tree, "tree_q") == rounds(tree, "tree_partials") == [1, 1, 1]


def test_a_span_smaller_than_the_group_counts_its_own_ranks() -> None:
    """Ranks 0, 2 and 3 of four: N is 3, and rank 1 sends nothing."""
    even = prefill(4, [8, 0, 8, 8])
    one = decode([6, 0, 5, 4], owner=3)
    two_homes = decode([6, 0, 5, 0], owner=2)
    num_heads, num_kv, e = 4, 2, 4
    cases = [
        Case(mode, pass_, (span,), (num_heads, num_kv), torch.float32)
        for span in (even, one, two_homes)
        for mode, pass_ in (("ring", "kv"), ("ring", "q"), ("tree", "kv"))
    ]
    found = books_of(4, cases)
    assert all(books[1] == {} for books in found)
    sizes = [(3, 24, 24), (3, 16, 1), (2, 12, 1)]  # N, S, T
    for i, (n, keys, tokens) in enumerate(sizes):
        kv, q, tree = found[3 * i : 3 * i + 3]
        queries, partials = tokens * num_heads * D * e, tokens * num_heads * (D * e + LSE)
        assert sum(sent(kv, "ring_pass_kv")) == (n - 1) * 2 * keys * num_kv * D * e
        assert max(rounds(kv, "ring_pass_kv")) == n - 1
        assert sum(sent(q, "ring_pass_q")) == (n - 1) * queries
        assert sum(sent(q, "ring_pass_q_partials")) == (n - 1) * partials
        assert sum(sent(tree, "tree_q")) == (n - 1) * queries
        assert sum(sent(tree, "tree_partials")) == (n - 1) * partials
    assert sent(found[0], "ring_pass_kv") == [2 * 2 * 24 * num_kv * D * e // 3, 0] + [4096] * 2


def test_the_example_of_the_formulas() -> None:
    """H 32, G 8, D 128, bf16, N 4, B 1: 6.2 KB of partials a rank, whatever S; here S is 1024, an
    128th of the example's, and so is the 402.7 MB of the ring."""
    past = [256, 256, 256, 256]
    span = resident(past, owners=[1, 1, 1, 1])
    modes = (("ring", "kv"), ("ring", "q"), ("tree", "kv"))
    cases = [Case(mode, p, (span,), (32, 8), torch.bfloat16, dim=128) for mode, p in modes]
    kv, q, tree = books_of(4, cases)
    assert sent(kv, "ring_pass_kv") == [3_145_728] * 4  # 402,653,184 / 128
    # four queries, one a rank: each rank sends what FORMULAS.md gives for B = 4
    assert sent(tree, "tree_partials") == [24_960] * 4  # 4 x 6,240
    both = [
        a + b for a, b in zip(sent(q, "ring_pass_q"), sent(q, "ring_pass_q_partials"), strict=True)
    ]
    assert both == [49_536] * 4  # 24,576 of queries and 24,960 of partials: the 49.5 KB


# --- several hosts


def tree_cases() -> tuple[list[str], Any]:
    """Requests whose keys are on every rank; ``make(size)`` gives the cases for that many ranks."""

    def make(size: int) -> list[Case]:
        some = tuple(decode([3 + (r + i) % 4 for r in range(size)], owner=i % size)
                     for i in range(6))  # fmt: skip
        long = prefill(size, [24 // size] * (size - 1) + [24 - 24 // size * (size - 1)])
        mixed = (*some[:3], long)
        return [
            Case("tree", "kv", items, heads, dtype)
            for items in (some, (long,), mixed)
            for heads in HEADS[:2]
            for dtype, _ in DTYPES
        ]

    return ["decode", "prefill", "both"], make


@pytest.mark.parametrize("hosts", ["ab", "aabb", "aaaabbbb", "abab", "abc", "aab"])
def test_tree_bytes_between_hosts_do_not_grow_with_the_ranks(hosts: str) -> None:
    """Over the job, whatever the ranks per host: (M-1)*B*H*(D*e+4) of partials and (M-1)*B*H*D*e
    of queries, each query once per other host, in at most two rounds."""
    size, others = len(hosts), len(set(hosts)) - 1
    _, make = tree_cases()
    found = books_of(size, make(size), hosts)
    tokens = [6] * 4 + [24] * 4 + [27] * 4
    kinds = list(itertools.product(HEADS[:2], DTYPES)) * 3
    for books, count, ((num_heads, _), (_, e)) in zip(found, tokens, kinds, strict=True):
        assert crossed(books, "tree_partials") == others * count * num_heads * (D * e + LSE)
        assert crossed(books, "tree_q") == others * count * num_heads * D * e
        # Over all links every rank but the owner gets each query and answers it, once.
        assert sum(sent(books, "tree_q")) == (size - 1) * count * num_heads * D * e
        for scheme in ("tree_q", "tree_partials"):
            assert max(rounds(books, scheme)) <= 2
            assert all(b[scheme].inter_host_bytes <= b[scheme].bytes for b in books if scheme in b)


def test_tree_sends_nothing_to_hosts_without_keys() -> None:
    """Keys on hosts a and b only: host c hears nothing and says nothing."""
    spans = (decode([4, 3, 2, 5, 0, 0], owner=0), decode([1, 1, 0, 6, 0, 0], owner=3))
    cases = [Case("tree", "kv", spans, (4, 2), torch.float32)]
    [books] = books_of(6, cases, "aabbcc")
    assert books[4] == books[5] == {}
    assert crossed(books, "tree_q") == 1 * 2 * 4 * D * 4
    assert crossed(books, "tree_partials") == 1 * 2 * 4 * (D * 4 + LSE)


@pytest.mark.parametrize("hosts", ["aabb", "abab", "abc"])
def test_ring_crosses_each_border_once_a_round(hosts: str) -> None:
    """Of a ring's N links M cross a border, and each carries (N-1)/N of the keys."""
    size, num_hosts = len(hosts), len(set(hosts))
    span = prefill(size, [6] * size)
    cases = [Case("ring", "kv", (span,), (4, 2), torch.float32)]
    [books] = books_of(size, cases, hosts)
    per_rank = (size - 1) * 2 * 6 * 2 * D * 4
    assert sent(books, "ring_pass_kv") == [per_rank] * size
    assert crossed(books, "ring_pass_kv") == num_hosts * per_rank


# --- the engine


def ship(world: World) -> list[Books]:
    """Two layers, two requests: 12 new tokens owned 4 / 4 / 4 with homes 12 / 0 / 0, and 9 new ones
    over 5 earlier, owned 3 / 3 / 3 with homes 0 / 5 / 4."""
    group, books = world_group(world), []
    plans = [
        _shipping_item(0, 0, [4, 4, 4], [12, 0, 0], [0, 0, 0]),
        _shipping_item(1, 5, [3, 3, 3], [0, 5, 4], [2, 3, 0]),
    ]
    for dtype, _ in DTYPES:
        layers = [LayerSpec(4, 2, D, 0.25)] * 2
        pool = KVPool(layers, 64, dtype, group.device)
        _, kernel = get_kernel("sdpa", group.device, dtype)
        step = StepContext(StepPlan(1, "run", tuple(plans)), group, layers, pool, kernel)
        world.ledger.clear()
        for layer in range(2):
            q = torch.randn(1, 4, step.num_rows, D).to(dtype)
            k, v = (torch.randn(1, 2, step.num_rows, D).to(dtype) for _ in "kv")
            step.attend(layer, q, k, v)
        books.append(world.ledger.schemes())
    return books


def _shipping_item(
    request: int, start: int, owners: list[int], homes: list[int], past: list[int]
) -> Item:
    q_runs, home_runs = contiguous(start, owners), contiguous(start, homes)
    earlier = contiguous(0, past)
    shards = []
    for rank in range(len(owners)):
        keys = earlier[rank] + home_runs[rank]
        extents = ((32 * request, total(keys)),) if keys else ()
        shards.append(Shard(rank, q_runs[rank], keys, extents, homes[rank]))
    tokens = tuple(range(1, sum(owners) + 1))
    return Item(request, "ring", "kv", start, tokens, tuple(shards), None)


def test_ship_kv_costs_one_kv_per_moved_token() -> None:
    """2*G*D*e per layer for each token whose home is not its owner, in one exchange a layer."""
    # Request 0: ranks 1 and 2 move 4 each. Request 1: positions 5-7, 8-10, 11-13 are owned by ranks
    # 0, 1, 2 and live on rank 1 (5-9) and rank 2 (10-13): rank 0 moves 3, rank 1 moves 1.
    for (_, e), *books in zip(DTYPES, *run_ranks(ship, 3), strict=True):
        one = 2 * 2 * D * e  # K and V of a token: 2 KV heads
        layers = 2
        assert sent(books, "ship_kv") == [layers * 3 * one, layers * 5 * one, layers * 4 * one]
        assert max(rounds(books, "ship_kv")) <= 2 * layers  # one per request and layer


PROMPTS = [[1, 2, 3, 4, 5], [7] * 20, list(range(100, 128)), [9]]
NEW = 6


def tokens_and_books(
    world: World, configs: list[dict[str, Any]], prompts: list[list[int]]
) -> list[tuple[list[Any], Books, dict[str, int]]]:
    found = []
    for config in configs:
        engine = engine_on(world, tiny_llama(), config)
        world.ledger.clear()
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=NEW))
        modes = engine._core.stats().mode_counts if engine._core else {}
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        found.append((tokens, world.ledger.schemes(), modes))
    return found


def greedy(prompts: list[list[int]]) -> list[list[int]]:
    """transformers' own tokens."""
    model = tiny_llama()
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        full = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        out.append(full[0, len(prompt) :].tolist())
    return out


def test_engine_books() -> None:
    """Local requests put nothing on the wire in attention, whichever rank they live on; a spanning
    prefill by ring and its decode by tree cost what the formulas say, layer by layer."""
    kv = {"tokens_per_rank": 64, "block_size": 8}
    configs = [
        {"kv_cache": kv},
        {"kv_cache": kv, "context_parallel": {"mode": "local"}},
        {
            "kv_cache": {**kv, "placement": "balanced"},
            "context_parallel": {"local_threshold": 8, "ring_pass": "kv"},
        },
    ]
    ranks = run_ranks(tokens_and_books, 3, configs[:2], PROMPTS)
    for i in range(2):
        tokens, _, modes = ranks[0][i]
        assert tokens == greedy(PROMPTS)
        assert set(modes) == {"local"} and sum(modes.values()) == len(PROMPTS) * NEW
        for rank in range(3):
            assert set(ranks[rank][i][1]) <= {"plan", "result"}
        # not all on rank 0: others have sent their tokens
        assert any("result" in ranks[rank][i][1] for rank in (1, 2))


def test_engine_spanning_books() -> None:
    """96 tokens in three even shares by ring, then decode by tree; and unequal budgets, where KV
    travels to its home once."""
    layers, num_heads, num_kv, e = 2, 4, 2, 4
    prompt = [(7 * i) % 128 for i in range(96)]
    even = {
        "kv_cache": {"tokens_per_rank": 64, "block_size": 8, "placement": "balanced"},
        "context_parallel": {"local_threshold": 8, "ring_pass": "kv"},
    }
    unequal = {
        "kv_cache": {"tokens_per_rank": [128, 32, 32], "block_size": 8},
        "context_parallel": {"local_threshold": 8, "layout": "contiguous"},
    }
    ranks = run_ranks(tokens_and_books, 3, [even, unequal], [prompt])
    assert ranks[0][0][0] == ranks[0][1][0] == greedy([prompt])
    assert ranks[0][0][2] == {"ring": 1, "tree": NEW - 1}
    books = [found[0][1] for found in ranks]
    assert sent(books, "ring_pass_kv") == [layers * 2 * 2 * 96 * num_kv * D * e // 3] * 3
    assert rounds(books, "ring_pass_kv") == [layers * 2] * 3
    steps = NEW - 1
    assert sum(sent(books, "tree_q")) == steps * layers * 2 * num_heads * D * e
    assert sum(sent(books, "tree_partials")) == steps * layers * 2 * num_heads * (D * e + LSE)
    assert sum(sent(books, "ship_kv")) == 0
    # All 96 live on rank 0 and are computed 32 / 32 / 32: 64 of them travel.
    shipped = sent([found[1][1] for found in ranks], "ship_kv")
    assert shipped == [0, layers * 32 * 2 * num_kv * D * e, layers * 32 * 2 * num_kv * D * e]
