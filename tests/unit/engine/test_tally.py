"""What a core counts: ended requests, ranks, bytes by formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.engine.tally import Tally
from ds_cp.engine.wire_model import WireModel
from ds_cp.kv.table import SequenceTable
from ds_cp.plan import ATTENTION_SCHEMES, NO_GRAMMAR, Chunk, Outcome, RankTimes, Sampled
from ds_cp.sampling_params import RequestOptions, SamplingParams
from tests.helpers.cluster import Cluster

NOTHING = (0,) * len(ATTENTION_SCHEMES)
# 6 layers, 4 of them windowed; G (D + V) e = 96, H D e = 40, H (V e + 4) = 56; blocks of 4.
MODEL = WireModel(6, ((8, 4),), 96, 40, 56, 4)
FULL = WireModel(2, (), 96, 40, 56, 4)


def table(homes: str, tokens: int) -> SequenceTable:
    return SequenceTable(4, [(int(rank), i) for i, rank in enumerate(homes)], tokens)


def test_names_of_schemes_are_those_of_the_ledger() -> None:
    from ds_cp.attention import ring, tree
    from ds_cp.worker import shipment

    names = {ring.SCHEME_KV, ring.SCHEME_Q, ring.SCHEME_Q_BACK, tree.SCHEME_Q,
             tree.SCHEME_PARTIALS, shipment.SCHEME_SHIP}  # fmt: skip
    assert set(ATTENTION_SCHEMES) == names and len(ATTENTION_SCHEMES) == len(names)


def test_bytes_by_formula() -> None:
    """The formulas of docs/formulas.md, written out; sums over the ranks."""
    homes = table("001122", 22)  # N = 3, S = 22 in 6 blocks
    chunk = Chunk(1, "ring", "kv", ((0, ((0, 8),)), (1, ((8, 8),)), (2, ((16, 6),))), (), True)
    assert FULL.of_chunk(chunk, homes) == {"ring_pass_kv": 2 * 2 * 24 * 96}
    asked = Chunk(1, "ring", "q", ((0, ((20, 2),)),), (), True)
    found = FULL.of_chunk(asked, homes)
    assert found["ring_pass_q"] == 2 * 2 * 2 * 40
    assert found["ring_pass_q_partials"] == 2 * 2 * 2 * 56
    assert found["ship_kv"] == 2 * 2 * 96, "both tokens belong to rank 2"
    assert FULL.of_decode("tree", "kv", homes) == {
        "tree_q": 2 * 2 * 40, "tree_partials": 2 * 2 * 56
    }  # fmt: skip
    assert FULL.of_decode("local", "kv", table("11", 8)) == {}
    assert FULL.of_chunk(Chunk(1, "local", "kv", ((1, ((0, 8),)),), (), True), table("11", 8)) == {}


def test_bytes_in_windows() -> None:
    """A decode asks the ranks that hold the last W = 8 keys, one other; full layers ask two."""
    assert MODEL.of_decode("tree", "kv", table("001122", 22)) == {
        "tree_q": (2 * 2 + 4 * 1) * 40, "tree_partials": (2 * 2 + 4 * 1) * 56,
    }  # fmt: skip
    short = table("01", 7)  # within the window: as without one
    assert MODEL.of_decode("tree", "kv", short)["tree_q"] == 6 * 40
    assert MODEL.of_decode("ring", "kv", table("001122", 22)) == {
        "ring_pass_kv": (2 * 2 * 24 + 4 * 12) * 96
    }  # fmt: skip


@given(st.data())
def test_a_decode_is_a_chunk_of_one_token(data: st.DataObject) -> None:
    """While the sequence grows and its blocks move; a decode is counted by a shorter way."""
    windows = data.draw(st.sampled_from([(), ((1, 2),), ((5, 1), (9, 2)), ((12, 3), (1000, 3))]))
    model = WireModel(6, windows, 96, 40, 56, 4)
    ranks = st.integers(0, 3)
    homes = table("".join(map(str, data.draw(st.lists(ranks, min_size=1, max_size=9)))), 0)
    homes.num_tokens = len(homes.homes) * 4 - data.draw(st.integers(0, 3))
    for step in range(8):
        newest = ((homes.last_rank, ((homes.num_tokens - 1, 1),)),)
        for mode, ring_pass in (("tree", "auto"), ("ring", "q"), ("ring", "kv")):
            chunk = Chunk(1, mode, ring_pass, newest, (), True)
            assert model.of_decode(mode, ring_pass, homes) == model.of_chunk(chunk, homes)
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(homes.homes) - 1))
            homes.replace(at, (data.draw(ranks), 100 + step))
        fresh = [(data.draw(ranks), 200 + step)] * (homes.open_slots == 0)
        homes.append(fresh, 1)


def test_ranks_and_skew() -> None:
    tally = Tally(3, None)
    sent = (100, 0, 0, 7, 9, 0)
    tally.step(Outcome(1, ranks=(RankTimes(0, 3.0, 1.0, sent), RankTimes(2, 5.0, 0.0, sent))))
    assert (tally.skew, tally.skew_seconds) == (5.0 / 3.5, 1.5)
    bad = (Sampled(4, NO_GRAMMAR, 0.0),)
    tally.step(Outcome(2, bad, ranks=(RankTimes(0, 2.0, 0.5, NOTHING),)))
    assert tally.skew == 5.0 / 3.5, "of the newest step of several ranks"
    found = [(rank.steps, rank.seconds, rank.waited) for rank in tally.ranks]
    assert found == [(2, 5.0, 1.5), (0, 0.0, 0.0), (1, 5.0, 0.0)]
    assert tally.sent == dict(zip(ATTENTION_SCHEMES, (200, 0, 0, 14, 18, 0), strict=True))
    assert tally.grammar_failures == 1


def test_requests_that_end_are_told_once() -> None:
    cluster = Cluster([4, 4], 4, mode=("ring", "kv"))
    whole = cluster.core.add(
        "whole", range(10), SamplingParams(max_tokens=3, seed=1), RequestOptions(http_id="h-1")
    )
    cluster.core.add("waits", range(5), SamplingParams(max_tokens=3, seed=1, n=2))
    for request in whole:
        request.arrival_time -= 2.0
    cluster.core.abort("waits")
    ended = cluster.core.tally.take_ended()
    assert [(e.request_id, e.index, e.finish_reason) for e in ended] == [
        ("waits", 1, "abort"), ("waits", 0, "abort"),
    ]  # fmt: skip
    assert all(e.ttft_s is None and e.queue_s is None and e.ranks == () for e in ended)
    while cluster.core.has_work:
        plan = cluster.core.plan()
        assert plan is not None
        draws = [c.request for c in plan.chunks if c.samples]
        draws += [number for d in plan.decodes for number in d.requests]
        cluster.core.apply(Outcome(plan.step, tuple(Sampled(n, 5, 0.0) for n in draws)))
    [one] = cluster.core.tally.take_ended()
    assert cluster.core.tally.take_ended() == []
    assert (one.request_id, one.http_id, one.finish_reason) == ("whole", "h-1", "length")
    assert (one.prompt_tokens, one.new_tokens, one.modes) == (10, 3, ("ring",))
    assert one.ranks == (0, 1)
    assert one.queue_s is not None and one.ttft_s is not None and one.prefill_s is not None
    assert one.decode_s is not None and one.tpot_s == pytest.approx(one.decode_s / 2)
    assert one.queue_s >= 2.0 and one.ttft_s == pytest.approx(one.queue_s + one.prefill_s)
    assert one.e2e_s >= one.ttft_s + one.decode_s
