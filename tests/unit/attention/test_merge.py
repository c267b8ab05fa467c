"""The merge of partials against fp64, and the traps that other merges have fallen into."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention import Partial, add_sinks, empty_partial, merge, merge_all
from ds_cp.attention.state import merge_rows

NAN, INF = float("nan"), float("inf")
T, H, D = 5, 3, 8


def scores_and_values(num_keys: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 scores ``[T, H, S]`` and values ``[S, H, D]``."""
    gen = torch.Generator().manual_seed(seed)
    scores = torch.randn(T, H, num_keys, generator=gen, dtype=torch.float64) * 3
    return scores, torch.randn(num_keys, H, D, generator=gen, dtype=torch.float64)


def attend(
    scores: torch.Tensor, values: torch.Tensor, keys: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 out and lse over some keys, from the definition."""
    if not keys:
        return torch.zeros(T, H, D, dtype=torch.float64), torch.full((T, H), -INF).double()
    some = scores[:, :, list(keys)]
    top = some.max(dim=-1, keepdim=True).values
    weights = torch.exp(some - top)
    mass = weights.sum(dim=-1)
    out = torch.einsum("ths,shd->thd", weights, values[list(keys)]) / mass.unsqueeze(-1)
    return out, torch.log(mass) + top[..., 0]


def partial_over(
    scores: torch.Tensor,
    values: torch.Tensor,
    keys: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Partial:
    out, lse = attend(scores, values, keys)
    return Partial(out.to(dtype), lse.float())


def assert_same_bits(a: Partial, b: Partial) -> None:
    assert torch.equal(a.out.view(torch.int32), b.out.view(torch.int32))
    assert torch.equal(a.lse.view(torch.int32), b.lse.view(torch.int32))


def assert_is(part: Partial, out: torch.Tensor, lse: torch.Tensor, limit: float = 2e-6) -> None:
    assert part.out.dtype == part.lse.dtype == torch.float32
    assert float((part.out - out).abs().max()) <= limit * float(out.abs().max())
    assert float((part.lse - lse).abs().max()) <= limit * max(1.0, float(lse.abs().max()))


def some_partial(dtype: torch.dtype = torch.float32) -> Partial:
    return partial_over(*scores_and_values(6), range(6), dtype)


# --- the identity


def test_the_identity_is_zero_and_minus_infinity() -> None:
    empty = empty_partial(T, H, D)
    assert empty.out.shape == (T, H, D) and empty.lse.shape == (T, H)
    assert torch.all(empty.out == 0) and torch.all(empty.lse == -INF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_side_changes_no_bit(dtype: torch.dtype) -> None:
    part, empty = some_partial(dtype), empty_partial(T, H, D)
    want = Partial(part.out.float(), part.lse)
    assert_same_bits(merge(part, empty), want)
    assert_same_bits(merge(empty, part), want)
    assert_same_bits(merge_all([empty, empty, part, empty]), want)


def test_empty_and_empty_is_empty() -> None:
    """The bare sigmoid form gives NaN here."""
    empty = empty_partial(T, H, D)
    assert_same_bits(merge(empty, empty), empty)
    assert_same_bits(merge_all([empty] * 5), empty)


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_an_empty_side_may_hold_anything_in_out(junk: float) -> None:
    """``0 * NaN`` is NaN: emptiness is decided by lse, and out is then not read."""
    part = some_partial()
    dirty = Partial(torch.full((T, H, D), junk), torch.full((T, H), -INF))
    assert_same_bits(merge(part, dirty), part)
    assert_same_bits(merge(dirty, part), part)
    assert_same_bits(merge(dirty, dirty), empty_partial(T, H, D))
    assert_same_bits(merge_all([dirty, part, dirty]), part)
    assert torch.all(torch.isnan(dirty.out) | torch.isinf(dirty.out))  # not cleaned in place


def test_rows_and_heads_are_empty_one_by_one() -> None:
    scores, values = scores_and_values(6)
    a, b = partial_over(scores, values, range(3)), partial_over(scores, values, range(3, 6))
    for part, rows in ((a, (0, 1)), (b, (1, 2))):
        for row in rows:
            part.out[row, 1], part.lse[row, 1] = NAN, -INF
    got = merge(a, b)
    out, lse = attend(scores, values, range(6))
    out[0, 1], lse[0, 1] = b.out[0, 1], b.lse[0, 1]
    out[2, 1], lse[2, 1] = a.out[2, 1], a.lse[2, 1]
    assert torch.all(got.out[1, 1] == 0) and got.lse[1, 1] == -INF
    out[1, 1], lse[1, 1] = 0.0, 0.0
    got.lse[1, 1] = 0.0
    assert_is(got, out, lse)


# --- values


def test_two_keys_by_hand() -> None:
    """Natural log: scores 0 and log 3 weigh 1/4 and 3/4, and lse is log 4."""
    a = Partial(torch.tensor([[[8.0]]]), torch.tensor([[0.0]]))
    b = Partial(torch.tensor([[[4.0]]]), torch.tensor([[math.log(3.0)]]))
    for got in (merge(a, b), merge(b, a)):
        assert got.out.item() == pytest.approx(5.0, rel=1e-6)
        assert got.lse.item() == pytest.approx(math.log(4.0), rel=1e-6)


@settings(max_examples=80)
@given(st.integers(1, 24), st.integers(0, 1000), st.data())
def test_any_order_of_any_partition_gives_the_whole(
    keys: int, seed: int, data: st.DataObject
) -> None:
    """Associative and commutative: shuffle the keys, cut them (empty parts too), fold as a random
    binary tree; the values are fp64's."""
    scores, values = scores_and_values(keys, seed)
    order = data.draw(st.permutations(range(keys)))
    cuts = sorted(data.draw(st.lists(st.integers(0, keys), max_size=7)))
    edges = [0, *cuts, keys]
    parts = [
        partial_over(scores, values, order[a:b])
        for a, b in zip(edges, edges[1:], strict=False)
    ]  # fmt: skip
    chain = merge_all(parts)
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [merge(parts[i + 1], parts[i])]
    out, lse = attend(scores, values, range(keys))
    assert_is(chain, out, lse, 4e-6)
    assert_is(Partial(parts[0].out.float(), parts[0].lse), out, lse, 4e-6)


finite_or_empty = st.one_of(st.just(-INF), st.floats(-(2.0**126), 2.0**126, width=32))


@settings(max_examples=300)
@given(finite_or_empty, finite_or_empty)
def test_no_nan_and_no_plus_infinity_from_any_lse(x: float, y: float) -> None:
    """Whatever the scores' size; and out stays between the two, as a mean does."""
    a = Partial(torch.full((1, 1, 2), 2.0), torch.tensor([[x]]))
    b = Partial(torch.full((1, 1, 2), 6.0), torch.tensor([[y]]))
    got = merge(a, b)
    if x == y == -INF:
        assert got.lse.item() == -INF and got.out.flatten().tolist() == [0.0, 0.0]
        return
    assert math.isfinite(got.lse.item())
    top, low = max(x, y), min(x, y)
    gap = 0.0 if low == -INF else math.exp(max(low - top, -745.0))
    assert got.lse.item() == pytest.approx(top + math.log1p(gap), rel=1e-6, abs=1e-6)
    weight = 1 / (1 + gap)
    near, far = (2.0, 6.0) if x >= y else (6.0, 2.0)
    want = near * weight + far * (1 - weight)
    assert got.out.flatten().tolist() == pytest.approx([want] * 2, rel=1e-5)


def test_no_tokens() -> None:
    empty = empty_partial(0, H, D)
    got = merge_all([empty, empty])
    assert got.out.shape == (0, H, D) and got.lse.shape == (0, H)


# --- precision


def drift(shards: int, running: torch.dtype) -> float:
    """Largest relative error of folding bf16 partials of 16 keys a shard. ``running``: the dtype
    that the running output is kept in."""
    worst = 0.0
    for seed in range(3):
        scores, values = scores_and_values(16 * shards, seed)
        parts = [
            partial_over(scores, values, range(16 * i, 16 * i + 16), torch.bfloat16)
            for i in range(shards)
        ]
        if running == torch.float32:
            got = merge_all(parts)
        else:
            got = parts[0]
            for part in parts[1:]:
                merged = merge(got, part)
                got = Partial(merged.out.to(running), merged.lse)
        out, _ = attend(scores, values, range(16 * shards))
        worst = max(worst, float((got.out.double() - out).abs().max() / out.abs().max()))
    return worst


def test_bf16_partials_do_not_drift_with_the_number_of_merges() -> None:
    """The error is that of the parts' own rounding, whatever their number; a running sum in bf16
    drifts, which shows that this test would see it."""
    few, many = drift(2, torch.float32), drift(64, torch.float32)
    assert few <= 2**-8 and many <= 2**-8
    assert many <= 1.5 * few
    assert drift(64, torch.bfloat16) >= 3 * many


def test_fp32_partials_stay_at_fp32() -> None:
    scores, values = scores_and_values(256)
    parts = [partial_over(scores, values, range(4 * i, 4 * i + 4)) for i in range(64)]
    out, lse = attend(scores, values, range(256))
    assert_is(merge_all(parts), out, lse)


def test_the_denominator_is_there() -> None:
    """A published example leaves it out and compares signs and argmax, which agree all the same."""
    scores, values = scores_and_values(12)
    a, b = partial_over(scores, values, range(6)), partial_over(scores, values, range(6, 12))
    out, _ = attend(scores, values, range(12))
    weight = torch.exp(b.lse - torch.maximum(a.lse, b.lse)).unsqueeze(-1)
    other = torch.exp(a.lse - torch.maximum(a.lse, b.lse)).unsqueeze(-1)
    undivided = other * a.out + weight * b.out
    assert torch.equal(undivided.argmax(-1), out.argmax(-1))
    assert torch.equal(undivided.sign(), out.float().sign())
    assert float((undivided - out).abs().max() / out.abs().max()) > 0.2
    assert float((merge(a, b).out - out).abs().max() / out.abs().max()) <= 2e-6


# --- sinks


def with_sinks(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """fp64: one more score per head, with no value."""
    return torch.cat([scores, sinks.double()[None, :, None].expand(T, H, 1)], dim=-1)


def test_sinks_enter_the_denominator_once() -> None:
    scores, values = scores_and_values(12)
    sinks = torch.tensor([0.5, -2.0, 6.0])
    values_too = torch.cat([values, torch.zeros(1, H, D, dtype=torch.float64)])
    out, lse = attend(with_sinks(scores, sinks), values_too, range(13))
    parts = [partial_over(scores, values, range(3 * i, 3 * i + 3)) for i in range(4)]
    whole = merge_all(parts)
    once = add_sinks(whole, sinks)
    assert_is(once, out, lse)
    per_part = merge_all([add_sinks(part, sinks) for part in parts])
    assert float((per_part.out - out).abs().max() / out.abs().max()) > 0.05


def test_sinks_over_no_keys_and_no_sinks_over_keys() -> None:
    """Only the sink is there: out 0, lse the sink. A sink of -inf is none; of any size, no NaN."""
    sinks = torch.tensor([0.5, -INF, 80.0])
    dirty = Partial(torch.full((T, H, D), 3.0), torch.full((T, H), -INF))
    for empty in (empty_partial(T, H, D), dirty):
        got = add_sinks(empty, sinks)
        assert torch.all(got.out == 0)
        assert torch.equal(got.lse, sinks.expand(T, H))
    part = some_partial()
    assert_same_bits(add_sinks(part, torch.full((H,), -INF)), part)
    assert torch.all(torch.isfinite(add_sinks(part, torch.full((H,), 3e38)).out))


# --- what the host waits for


def test_a_merge_does_not_wait_for_the_device() -> None:
    """On the meta device no value can be read: whatever asks for one raises."""
    part, empty = empty_partial(T, H, D, "meta"), empty_partial(T, H, D, "meta")
    merge_rows(empty, part, None)
    some = torch.zeros(T, dtype=torch.int64, device="meta")
    merge_rows(empty, part, some)
    for merged in (empty, merge(part, empty), merge_all([empty, part, part, empty])):
        assert merged.out.shape == (T, H, D) and merged.lse.shape == (T, H)
    assert add_sinks(part, torch.zeros(H, device="meta")).out.shape == (T, H, D)


# --- into rows of a running partial


def clone(part: Partial) -> Partial:
    return Partial(part.out.clone(), part.lse.clone())


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 0.0])
def test_rows_that_are_empty_on_neither_side_one_or_both(junk: float) -> None:
    """What an empty side holds in out is not read, on either side."""
    scores, values = scores_and_values(8)
    into, part = (partial_over(scores, values, range(4 * i, 4 * i + 4)) for i in range(2))
    for side, rows in ((into, (0, 1)), (part, (1, 2))):
        for row in rows:
            side.out[row], side.lse[row] = junk, -INF
    kept = clone(part)
    want = clone(into)
    want.out[0], want.lse[0] = part.out[0], part.lse[0]
    want.out[1], want.lse[1] = 0.0, -INF
    want.out[3:], want.lse[3:] = (x[3:].float() for x in attend(scores, values, range(8)))
    merge_rows(into, part, None)
    assert_same_bits(Partial(into.out[:3], into.lse[:3]), Partial(want.out[:3], want.lse[:3]))
    assert_is(Partial(into.out[3:], into.lse[3:]), want.out[3:], want.lse[3:])
    assert torch.equal(part.lse, kept.lse)
    assert torch.equal(part.out.nan_to_num(7.0), kept.out.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [[4, 0, 2], [3], [], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
def test_some_rows_are_merged_and_the_others_left(rows: list[int], dtype: torch.dtype) -> None:
    """Row i of the part goes to ``rows[i]``, with the bits of a merge of that row alone."""
    scores, values = scores_and_values(12)
    into = partial_over(scores, values, range(6))
    part = partial_over(scores, values, range(6, 12), dtype)
    few = Partial(part.out[: len(rows)], part.lse[: len(rows)])
    want = clone(into)
    for i, row in enumerate(rows):
        one = merge(
            Partial(into.out[row : row + 1], into.lse[row : row + 1]),
            Partial(few.out[i : i + 1], few.lse[i : i + 1]),
        )
        want.out[row], want.lse[row] = one.out[0], one.lse[0]
    merge_rows(into, few, torch.tensor(rows, dtype=torch.int64))
    assert_same_bits(into, want)


def test_a_view_of_rows_is_folded_in_place() -> None:
    """As modes do it: rows of one running partial, whatever the strides of the part."""
    scores, values = scores_and_values(12)
    into, part = (partial_over(scores, values, range(6 * i, 6 * i + 6)) for i in range(2))
    whole = merge(into, part)
    before = clone(into)
    middle = slice(1, 4)
    heads_first = Partial(
        part.out.transpose(0, 1).contiguous().transpose(0, 1), part.lse.T.contiguous().T
    )
    merge_rows(
        Partial(into.out[middle], into.lse[middle]),
        Partial(heads_first.out[middle], heads_first.lse[middle]),
        None,
    )
    for row in range(T):
        want = whole if 1 <= row < 4 else before
        assert torch.equal(into.out[row], want.out[row])
        assert torch.equal(into.lse[row], want.lse[row])


def test_fp64_partials_stay_at_fp64() -> None:
    scores, values = scores_and_values(12)
    into, part = (Partial(*attend(scores, values, range(6 * i, 6 * i + 6))) for i in range(2))
    merge_rows(into, part, None)
    out, lse = attend(scores, values, range(12))
    assert float((into.out - out).abs().max()) <= 1e-13
    assert float((into.lse - lse).abs().max()) <= 1e-13


def test_folding_into_rows_is_the_chain_of_merges() -> None:
    """To the bit: one running partial gives what ``merge_all`` gives."""
    scores, values = scores_and_values(60)
    parts = [partial_over(scores, values, range(4 * i, 4 * i + 4)) for i in range(15)]
    parts[3] = parts[9] = empty_partial(T, H, D)
    into = empty_partial(T, H, D)
    for part in parts:
        merge_rows(into, part, None)
    assert_same_bits(into, merge_all(parts))


# --- order, ownership


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_order_gives_the_same_bits(dtype: torch.dtype) -> None:
    scores, values = scores_and_values(60)
    parts = [partial_over(scores, values, range(4 * i, 4 * i + 4), dtype) for i in range(15)]
    first = merge_all(parts)
    for _ in range(3):
        assert_same_bits(merge_all(parts), first)
    assert_same_bits(merge_all(iter(parts)), first)
    folded = merge(parts[0], parts[1])
    for part in parts[2:]:
        folded = merge(folded, part)
    assert_same_bits(folded, first)  # in place and copied are the same sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_left_alone(dtype: torch.dtype) -> None:
    scores, values = scores_and_values(12)
    parts = [partial_over(scores, values, range(4 * i, 4 * i + 4), dtype) for i in range(3)]
    parts.insert(0, Partial(torch.full((T, H, D), NAN), torch.full((T, H), -INF)))
    kept = [(part.out.clone(), part.lse.clone()) for part in parts]
    for run in (lambda: merge_all(parts), lambda: merge(parts[0], parts[1])):
        run()
        for part, (out, lse) in zip(parts, kept, strict=True):
            assert torch.equal(part.out.nan_to_num(7.0), out.nan_to_num(7.0))
            assert torch.equal(part.lse, lse)


def test_one_partial_is_returned_as_it_is_and_none_is_an_error() -> None:
    part = some_partial(torch.bfloat16)
    assert merge_all([part]) is part
    with pytest.raises(ValueError, match="no partials"):
        merge_all([])
