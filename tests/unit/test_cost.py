"""The cost model against its formulas written out another way, and its choices."""

from __future__ import annotations

import itertools
import math
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


def brute(cost: CostModel, ranks: int, new: int, past: int) -> float:
    """Seconds of a prefill, layer by layer and step by step around the ring. Of what travels the
    smaller kind is chosen over all layers; what attention does not hide is added over all."""
    seconds = 2.0 * cost.weights * new / cost.flops_per_s / ranks
    windows: list[int | None] = [w for w, count in cost.windows for _ in range(count)]
    windows += [None] * (cost.num_layers - len(windows))
    attention = kv = hops = 0.0
    for window in windows:
        pairs = sum(min(past + i + 1, window or 10**9) for i in range(new))
        attention += 4.0 * cost.num_q_heads * cost.head_dim * pairs / cost.flops_per_s / ranks
        tokens = (ranks - 1) * (past + new) / ranks
        tokens = tokens if window is None else min(tokens, 2 * window)
        kv += 2 * tokens * cost.num_kv_heads * cost.head_dim * cost.element
        hops += ranks - 1 if window is None else 1
    if ranks == 1:
        return seconds + attention
    q = new * cost.num_q_heads * cost.head_dim * cost.element / ranks
    back = new * cost.num_q_heads * (cost.head_dim * cost.element + 4) / ranks
    sent = min(kv, (q + back) * (ranks - 1) * cost.num_layers)
    traffic = sent / cost.bytes_per_s + hops * cost.latency_s
    hidden = min(traffic, attention) if cost.in_background else 0.0
    return seconds + attention + traffic - hidden + cost.num_layers * cost.latency_s


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 5000), (200, 0), (200, 3000), (3000, 100)])
@pytest.mark.parametrize("speed", [1e11, 2e14])
@pytest.mark.parametrize("windows", [(), ((128, 2),), ((16, 1), (1000, 2))])
@pytest.mark.parametrize("in_background", [True, False])
def test_prefill_is_the_formula(
    ranks: int, new: int, past: int, speed: float, windows: tuple[tuple[int, int], ...],
    in_background: bool,
) -> None:  # fmt: skip
    cost = CostModel(speed, 2e10, 1e-5, 3, 32, 8, 128, 10**8, 2, windows, in_background)
    want = brute(cost, ranks, new, past)
    assert cost.prefill_s(ranks, new, past) == pytest.approx(want, rel=1e-9)


def test_decode_reads_what_the_windows_see() -> None:
    windowed = replace(LLAMA, windows=((1024, 24),))
    full = LLAMA.decode_s(1, 100_000)
    assert windowed.decode_s(1, 100_000) == pytest.approx(full * (8 + 24 * 0.01024) / 32)
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
    alone, over = LLAMA.decode_s(1, 10_000), LLAMA.decode_s(4, 10_000)
    assert alone == pytest.approx(4 * 10_000 * 32 * 128 * 32 / 2e14)
    assert over == pytest.approx(alone / 4 + 64 * 1e-5)


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
    for ranks, (more, further) in itertools.product((1, 2, 8), ((1, 0), (0, 1), (100, 100))):
        longer = cost.prefill_s(ranks, new + more, past + further)
        # Equal where queries travel, however much is stored.
        assert longer >= cost.prefill_s(ranks, new, past) * (1 - 1e-12)
    assert cost.prefill_s(1, new, past) >= 2 * cost.weights * new / cost.flops_per_s


# --- one forward call, for a job that is sized

FULL = replace(
    LLAMA, attention_flops_per_s=1e14, memory_bytes_per_s=2e12, layer_s=2e-5, step_s=3e-4,
    hop_s=4e-5, head=10**8, stored=10**10,
)  # fmt: skip


def by_hand(cost: CostModel, mode: Passing, ranks: int, new: int, past: int) -> float:
    """Seconds of a call, added up layer by layer as ``forward_s`` and ``_exchanges_s`` say."""
    tokens = math.ceil(new / ranks)
    memory, element, dim = cost.memory_bytes_per_s, cost.element, cost.head_dim
    read = min(cost.weights * tokens, cost.stored) * element / memory
    seconds = cost.step_s + max(2 * cost.weights * tokens / cost.flops_per_s, read)
    seconds += max(2 * cost.head / cost.flops_per_s, cost.head * element / memory)
    windows: list[int | None] = [w for w, count in cost.windows for _ in range(count)]
    windows += [None] * (cost.num_layers - len(windows))
    attention = travel = waits = 0.0
    for window in windows:
        pairs = sum(min(past + i + 1, window or 10**9) for i in range(new))
        keys = min(past + new, window + new) if window else past + new
        work = 4 * pairs * cost.num_q_heads * dim / cost.attention_flops_per_s
        load = 2 * keys * cost.num_kv_heads * dim * element / (cost.kv_bytes_per_s or memory)
        attention += max(work, load) / ranks
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
    assert step == pytest.approx(LLAMA.decode_s(1, 5001))


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
