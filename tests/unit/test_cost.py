"""The cost model against its formulas written out another way, and its choices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.cost import CLOSE, WORTH, CostModel

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
