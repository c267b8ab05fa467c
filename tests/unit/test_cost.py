"""The cost model against its formulas written out another way, and its choices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.cost import CLOSE, WORTH, CostModel, Passing, Sums

LLAMA = CostModel(
    flops_per_s=2e14, bytes_per_s=2e10, latency_s=1e-5, num_layers=32, num_q_heads=32,
    num_kv_heads=8, head_dim=128, weights=8 * 10**9, element=2,
)  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 5000), (200, 0), (200, 3000), (3000, 100)])
@pytest.mark.parametrize("speed", [1e11, 2e14])
@pytest.mark.parametrize("windows", [(), ((128, 2),), ((16, 1), (1000, 2))])
@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("memory", [{}, {"memory_bytes_per_s": 1e9}, {"memory_bytes_per_s": 1e11}])
def test_a_prefill_takes_what_the_faster_ring_takes(
    ranks: int, new: int, past: int, speed: float, windows: tuple[tuple[int, int], ...],
    in_background: bool, memory: dict[str, float],
) -> None:  # fmt: skip
    cost = CostModel(
        speed, 2e10, 1e-5, 3, 32, 8, 128, 10**8, 2, windows, in_background, head=10**6, **memory
    )
    want = min(by_hand(cost, mode, ranks, new, past) for mode in ("kv", "q"))
    assert cost.prefill_s(ranks, new, past) == pytest.approx(want, rel=1e-9)


def test_decode_reads_what_the_windows_see() -> None:
    windowed = replace(LLAMA, windows=((1024, 24),))
    full = LLAMA.decode_s(1, 100_000)
    assert windowed.decode_s(1, 100_000) == pytest.approx(full * (8 + 24 * 0.01024) / 32, rel=1e-4)
    assert windowed.decode_s(1, 1000) == pytest.approx(LLAMA.decode_s(1, 1000))


def test_nothing_hides_where_the_computing_thread_moves_the_bytes() -> None:
    shared = replace(LLAMA, in_background=False)
    assert LLAMA.kv_hides(4, 10**6) and not shared.kv_hides(4, 10**6)
    assert shared.prefill_s(4, 10_000, 0) > LLAMA.prefill_s(4, 10_000, 0)


def test_messages_of_the_design_page() -> None:
    """32 query and 8 KV heads of 128, bf16, 128 Ki tokens, 4 ranks, a layer: 402.7 MB of KV."""
    kv = LLAMA._pass_kv_bytes(4, 128 * 1024)
    assert kv == 402_653_184
    assert LLAMA._pass_q_bytes(4, 1) == 3 / 4 * 32 * (256 + 256 + 4)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_passing_queries_costs_its_bytes_and_the_wait_for_who_holds_most(share: float) -> None:
    for ranks, new, past in itertools.product((2, 4), (10, 900), (500, 50_000)):
        if share * ranks < 1:
            continue
        pairs = sum(past + i + 1 for i in range(new))
        work = 4.0 * 32 * 128 * pairs  # of a layer
        lag = (share - 1 / ranks) * work / LLAMA.flops_per_s
        q = (ranks - 1) / ranks * new * 32 * (256 + 260) / LLAMA.bytes_per_s
        kv = (ranks - 1) * share * (new + past) * 2 * 8 * 256 / LLAMA.bytes_per_s
        assert LLAMA.pass_q_pays(ranks, new, past, share) == (q + lag <= kv)


def test_decode_is_two_exchanges_a_layer_more() -> None:
    alone, over = LLAMA.decode_s(1, 9_999), LLAMA.decode_s(4, 9_999)
    assert alone == pytest.approx(4 * 10_000 * 32 * 128 * 32 / 2e14)
    moved = 3 / 4 * 32 * (2 * 256 + 4) / LLAMA.bytes_per_s
    assert over == pytest.approx(alone / 4 + 32 * (2e-5 + moved))
    slow = replace(LLAMA, memory_bytes_per_s=1e10)
    assert slow.decode_s(1, 9_999) == pytest.approx(32 * 10_000 * 2 * 8 * 256 / 1e10), "KV is read"


def test_kv_hides_from_so_many_new_tokens_on() -> None:
    """T >= N C G e / (2 H BW), whatever is stored: 4 * 2e14 * 8 * 2 / (2 * 32 * 2e10)."""
    assert LLAMA.tokens_that_hide_kv(4) == pytest.approx(10_000)
    assert LLAMA.kv_hides(4, 10_000) and not LLAMA.kv_hides(4, 9_999)
    # at that number, attention over S tokens takes as long as moving them
    new, past = 10_000, 2_000_000
    attention = 4.0 * new * (past + new) * 32 * 128 / 4 / 2e14
    traffic = 2 * 8 * 128 * 2 * (past + new) / 2e10
    assert attention == pytest.approx(traffic, rel=1e-9)


def test_choices() -> None:
    assert LLAMA.best_ranks(8, 100_000, 0, 1) == 8, "a long prompt takes all"
    assert LLAMA.best_ranks(8, 8, 0, 1) == 1, "a short one is not worth the latency"
    assert LLAMA.best_ranks(8, 2_000, 0, 100_000) == 1, "nor one whose answer is long"
    assert LLAMA.best_ranks(1, 100_000, 0, 1) == 1
    assert LLAMA.best_ranks(4, 100_000, 0, 1) == 4, "the last one brings a quarter less"


sizes = st.integers(1, 10**5)
models = st.builds(
    CostModel,
    st.floats(1e8, 1e15), st.floats(1e7, 1e12), st.floats(1e-7, 1e-2), st.integers(1, 80),
    st.sampled_from([8, 32]), st.sampled_from([1, 8]), st.sampled_from([64, 128]),
    st.integers(10**5, 10**10), st.sampled_from([2, 4]),
)  # fmt: skip


@given(models, sizes, st.integers(0, 10**5), st.integers(1, 10**4))
def test_more_ranks_are_taken_only_if_they_are_clearly_faster(
    cost: CostModel, new: int, past: int, answer: int
) -> None:
    def whole(ranks: int) -> float:
        return cost.prefill_s(ranks, new, past) + answer * cost.decode_s(ranks, past + new)

    for most in range(1, 9):
        times = [whole(ranks) for ranks in range(1, most + 1)]
        best = cost.best_ranks(most, new, past, answer)
        if best == 1:
            assert min(times) >= WORTH * times[0]
        else:
            assert min(times) < WORTH * times[0] and times[best - 1] <= CLOSE * min(times)
            assert all(t > CLOSE * min(times) for t in times[: best - 1]), "fewer are as good"


@given(models, sizes, st.integers(0, 10**5))
def test_more_work_takes_longer(cost: CostModel, new: int, past: int) -> None:
    new = max(new, 8)  # where ranks have no query, nothing hides under attention
    for ranks, (more, further) in itertools.product((1, 2, 8), ((1, 0), (0, 1), (100, 100))):
        longer = cost.prefill_s(ranks, new + more, past + further)
        # Equal where queries travel, however much is stored.
        assert longer >= cost.prefill_s(ranks, new, past) * (1 - 1e-12)
    assert cost.prefill_s(1, new, past) >= 2 * cost.weights * new / cost.flops_per_s


# --- weights are read by every rank that has a token

# SmolLM2 135M in fp32 on 2 cores: rates as start-up measures them, by shared memory
LAPTOP = CostModel(
    flops_per_s=1.1e11, bytes_per_s=1.6e10, latency_s=5e-6, num_layers=30, num_q_heads=9,
    num_kv_heads=3, head_dim=64, weights=106_000_000, element=4, in_background=False,
    memory_bytes_per_s=1.5e10, alone_bytes_per_s=2.5e10, readers=2, layer_s=2e-4, hop_s=2.5e-4,
    head=28_000_000,
)  # fmt: skip
# Llama 3 8B in bf16 on 8 GPUs of a host: memory of their own, links in the background
GPUS = CostModel(
    flops_per_s=5e14, bytes_per_s=3.6e11, latency_s=1e-5, num_layers=32, num_q_heads=32,
    num_kv_heads=8, head_dim=128, weights=7 * 10**9, element=2, memory_bytes_per_s=2.7e12,
    alone_bytes_per_s=2.7e12, readers=8, head=525 * 10**6,
)  # fmt: skip


def test_linear_layers_take_what_was_measured() -> None:
    """Those of SmolLM2 135M, packed, on one core of an EPYC: 105 GFLOP/s by many rows, 28.5 GB/s by
    one; milliseconds, the fastest of up to 40 calls."""
    cost = replace(LAPTOP, flops_per_s=1.05e11, alone_bytes_per_s=2.85e10, head=0)
    measured = {1: 14.9, 2: 14.5, 4: 16.3, 8: 25.3, 16: 40.0, 32: 71.4, 64: 132.3, 256: 516.2}
    for tokens, milliseconds in measured.items():
        assert cost._linear_s(1, tokens) * 1e3 == pytest.approx(milliseconds, rel=0.15)


def test_what_a_hop_takes_keeps_short_prompts_on_one_rank() -> None:
    quick, slow = replace(LAPTOP, hop_s=0.0), replace(LAPTOP, hop_s=2e-3)
    assert quick.best_ranks(2, 64, 0, 16) == 2 and slow.best_ranks(2, 64, 0, 16) == 1
    assert slow.best_ranks(2, 1000, 0, 16) == 2


def test_the_ranks_of_a_host_share_its_memory() -> None:
    """Four at once read 6e9 each, 2.4e10 together; one alone at most 1e10."""
    cost = replace(LAPTOP, memory_bytes_per_s=6e9, alone_bytes_per_s=1e10, readers=4)
    rates = [cost.reading_per_s(ranks) for ranks in (1, 2, 3, 4, 8)]
    assert rates == pytest.approx([1e10, 1e10, 8e9, 6e9, 6e9])
    assert [GPUS.reading_per_s(ranks) for ranks in (1, 8)] == [2.7e12, 2.7e12], "own memory"
    less = replace(cost, alone_bytes_per_s=1e9)
    assert less.reading_per_s(1) == 6e9, "a rank alone is not slower than among others"
    assert replace(cost, alone_bytes_per_s=None).reading_per_s(1) == 6e9


@pytest.mark.parametrize("cost", [LAPTOP, GPUS], ids=["laptop", "gpus"])
def test_a_short_chunk_gains_nothing_by_ranks(cost: CostModel) -> None:
    """As long as it is bound by reading weights; by hand, for the part of the layers."""
    reading = cost.weights * cost.element / cost.reading_per_s(1)
    bound = int(reading * cost.flops_per_s / (2 * cost.weights))  # tokens that take as long
    assert bound >= 8
    for new in (1, bound // 2, bound):
        assert all(cost.best_ranks(most, new, 0, 16) == 1 for most in range(1, 9))
    alone = cost.prefill_s(1, bound // 4, 0)
    assert all(alone < cost.prefill_s(ranks, bound // 4, 0) for ranks in range(2, 9))
    free = replace(
        cost, memory_bytes_per_s=float("inf"), alone_bytes_per_s=None, latency_s=0.0, layer_s=0.0,
        hop_s=0.0,
    )  # fmt: skip
    assert free.best_ranks(2, bound, 0, 16) == 2, "without the floor it would be spread"


@pytest.mark.parametrize(("cost", "most", "long"), [(LAPTOP, 2, 1000), (GPUS, 8, 30_000)])
def test_the_longer_a_prompt_the_more_ranks(cost: CostModel, most: int, long: int) -> None:
    lengths = sorted({1, *(int(1.1**i) for i in range(140) if 1.1**i < 10 * long)})
    ranks = [cost.best_ranks(most, new, 0, 16) for new in lengths]
    assert ranks == sorted(ranks), "monotone in the length"
    assert ranks[0] == 1 and ranks[-1] == most
    assert all(n == most for new, n in zip(lengths, ranks, strict=True) if new >= long)


def test_where_memory_is_shared_more_tokens_stay_on_one_rank() -> None:
    def first_spread(cost: CostModel) -> int:
        return next(new for new in range(1, 10_000) if cost.best_ranks(2, new, 0, 16) > 1)

    own = replace(LAPTOP, memory_bytes_per_s=2.5e10, alone_bytes_per_s=2.5e10)
    slow = replace(LAPTOP, memory_bytes_per_s=1e10, alone_bytes_per_s=1e10)
    assert first_spread(own) < first_spread(LAPTOP) < first_spread(slow)
    assert LAPTOP.best_ranks(2, 1, 100_000, 1) == 1, "one token over a long prefix"


@given(
    st.floats(1e9, 1e15), st.floats(1e8, 1e13), st.floats(1, 8), st.integers(1, 8), sizes,
    st.integers(0, 10**5), st.booleans(),
)  # fmt: skip
def test_no_prefill_is_faster_than_reading_or_computing(
    flops: float, memory: float, ratio: float, readers: int, new: int, past: int, sparse: bool
) -> None:
    cost = replace(
        GPUS, flops_per_s=flops, memory_bytes_per_s=memory, alone_bytes_per_s=memory * ratio,
        readers=readers, stored=GPUS.weights * 4 if sparse else 0,
    )  # fmt: skip
    for ranks in range(1, 9):
        seconds = cost.prefill_s(ranks, new, past) * (1 + 1e-9)
        assert seconds >= GPUS.weights * 2 / (memory * ratio)
        assert seconds >= 2.0 * GPUS.weights * new / ranks / flops


# --- one forward call, for a job that is sized

FULL = replace(
    LLAMA, attention_flops_per_s=1e14, memory_bytes_per_s=2e12, layer_s=2e-5, step_s=3e-4,
    hop_s=4e-5, head=10**8, stored=10**10,
)  # fmt: skip


def by_hand(cost: CostModel, mode: Passing, ranks: int, new: int, past: int) -> float:
    """Seconds of a call, added up layer by layer as ``forward_s`` and ``_exchanges_s`` say."""
    tokens = max(new / ranks, 1)
    memory, element, dim = cost.memory_bytes_per_s, cost.element, cost.head_dim
    read = min(cost.weights * tokens, max(cost.stored, cost.weights)) * element / memory
    computing = 2 * cost.weights * tokens / cost.flops_per_s
    seconds = cost.step_s + (computing**2 + read**2) ** 0.5
    seconds += max(2 * cost.head / cost.flops_per_s, cost.head * element / memory)
    windows: list[int | None] = [w for w, count in cost.windows for _ in range(count)]
    windows += [None] * (cost.num_layers - len(windows))
    operations = reading = travel = waits = 0.0
    for window in windows:
        pairs = sum(min(past + i + 1, window or 10**9) for i in range(new))
        keys = min(past + new, window + new) if window else past + new
        work = 4 * pairs * cost.num_q_heads * dim / (cost.attention_flops_per_s or cost.flops_per_s)
        load = 2 * keys * cost.num_kv_heads * dim * element / (cost.kv_bytes_per_s or memory)
        operations, reading = operations + work, reading + load
        rows = new * (ranks - 1) / ranks * cost.num_q_heads
        hops = 1 if window else ranks - 1
        if mode == "kv":
            kv = (past + new) * (ranks - 1) / ranks
            kv = min(kv, 2 * window) if window else kv
            sent = 2 * kv * cost.num_kv_heads * dim * element
            travel += sent / cost.bytes_per_s + hops * cost.latency_s
        elif mode == "q":
            travel += rows * dim * element / cost.bytes_per_s + hops * cost.latency_s
            waits += rows * (dim * element + 4) / cost.bytes_per_s + cost.latency_s
        else:
            once = cost.latency_s + (cost.near_latency_s or 0)
            travel += rows * dim * element / cost.bytes_per_s + once
            waits += rows * (dim * element + 4) / cost.bytes_per_s + once
        waits += rows * dim * 8 / memory + (0 if mode == "tree" else hops * cost.hop_s)
        waits += cost.layer_s
    attention = max(operations, reading) / ranks
    if ranks == 1:
        return seconds + attention + cost.num_layers * cost.layer_s
    hidden = attention / (ranks if mode == "tree" else 1)
    if not cost.in_background or new < ranks:
        hidden = 0.0
    return seconds + attention + max(0.0, travel - hidden) + waits


@pytest.mark.parametrize("mode", ["kv", "q", "tree"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 90_000), (50, 2000), (3000, 100)])
@pytest.mark.parametrize(
    "change",
    [{}, {"windows": ((128, 30),)}, {"in_background": False}, {"near_latency_s": 2e-6},
     {"bytes_per_s": 1e8}, {"kv_bytes_per_s": 1e11}],
)  # fmt: skip
def test_a_forward_call_is_the_sum_of_its_parts(
    mode: Passing, ranks: int, new: int, past: int, change: dict[str, Any]
) -> None:
    cost = replace(FULL, **change)
    want = by_hand(cost, mode, ranks, new, past)
    assert cost.forward_s(mode, ranks, new, past) == pytest.approx(want, rel=1e-9)


def test_what_is_left_out_costs_nothing() -> None:
    """The scheduler's own model: linear layers and attention by operations alone."""
    alone = LLAMA.forward_s("local", 4, 1000, 500)
    assert alone == pytest.approx(LLAMA.prefill_s(1, 1000, 500))
    step = LLAMA.forward_s("local", 1, 1, 5000) - 2 * LLAMA.weights / LLAMA.flops_per_s
    assert step == pytest.approx(LLAMA.decode_s(1, 5000))


def test_chunks_are_calls_one_after_another() -> None:
    calls = [(100, 7), (100, 107), (50, 207)]
    want = sum(FULL.forward_s("kv", 2, new, past) for new, past in calls)
    assert FULL.chunks_s("kv", 2, 250, 7, 100) == pytest.approx(want)
    assert FULL.chunks_s("kv", 2, 250, 7, 250) == FULL.forward_s("kv", 2, 250, 7)


def test_sums_of_tensor_parallelism_go_round_twice() -> None:
    sums = Sums(ranks=4, per_layer=2, width=100, bytes_per_s=1e6, latency_s=1e-3)
    assert sums.layer_s(10, 2) == pytest.approx(2 * (2 * 0.75 * 10 * 100 * 2 / 1e6 + 2e-3))
    assert replace(sums, ranks=1).layer_s(10, 2) == 0
    with_sums = replace(FULL, sums=sums).forward_s("local", 1, 10, 0)
    assert with_sums - FULL.forward_s("local", 1, 10, 0) == pytest.approx(32 * sums.layer_s(10, 2))
