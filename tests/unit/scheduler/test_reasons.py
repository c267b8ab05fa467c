"""Why a request runs as it does, as the policy and the block manager leave it on the request."""

from __future__ import annotations

import pytest

from ds_cp.cost import CostModel
from ds_cp.scheduler.mode_policy import ModePolicy
from ds_cp.scheduler.reasons import ModeReason, SpanReason
from tests.helpers.cluster import Cluster, greedy, prompt

RATES = CostModel(1e12, 1e10, 1e-6, 16, 8, 2, 64, 10**8, 2)
SLOW_LINK = CostModel(1e12, 1e6, 1e-2, 16, 8, 2, 64, 10**8, 2)


def policy(
    mode: str = "auto",
    ring_pass: str = "auto",
    threshold: int | None = None,
    hosts: int = 1,
    cost: CostModel | None = None,
) -> ModePolicy:
    return ModePolicy(mode, ring_pass, threshold, hosts, 8, 2, cost)


@pytest.mark.parametrize(
    ("rule", "asked", "why"),
    [
        (policy("local"), (1, 9, 0), ModeReason.SET),
        (policy("tree"), (3, 9, 0), ModeReason.SET),
        (policy(), (1, 9, 0), ModeReason.ONE_RANK),
        (policy(), (2, 1, 90), ModeReason.ONE_QUERY),
        (policy(hosts=2), (4, 90, 90), ModeReason.HOSTS),
        (policy("ring", "q"), (2, 90, 90), ModeReason.PASS_SET),
        (policy(), (2, 90, 900, 1.0), ModeReason.UNEVEN),
        (policy(), (2, 90, 0), ModeReason.FIRST),
        (policy(cost=RATES), (2, 10**5, 100), ModeReason.HIDES),
        (policy(), (2, 100, 50), ModeReason.KV_SMALLER),
        (policy(), (2, 90, 900), ModeReason.Q_SMALLER),
    ],
)
def test_a_mode_has_a_reason(rule: ModePolicy, asked: tuple[int, ...], why: ModeReason) -> None:
    assert rule.decide(*asked).why is why


@pytest.mark.parametrize(
    ("rule", "busy", "ranks", "why"),
    [
        (policy("local"), False, 1, SpanReason.LOCAL_SET),
        (policy("ring"), True, 4, SpanReason.SPAN_SET),
        (policy(threshold=10), False, 4, SpanReason.LONG),
        (policy(threshold=10**6), False, 1, SpanReason.SHORT),
        (policy(cost=RATES), True, 1, SpanReason.BUSY),
        (policy(), False, 1, SpanReason.NO_RATES),
        (policy(cost=SLOW_LINK), False, 1, SpanReason.ONE_PAYS),
        (policy(cost=RATES), False, 4, SpanReason.MORE_PAYS),
    ],
)
def test_a_span_has_a_reason(rule: ModePolicy, busy: bool, ranks: int, why: SpanReason) -> None:
    width = rule.width(4, 100_000, 0, 1, busy)
    assert (width.ranks, width.why) == (ranks, why)


def test_reasons_of_a_request_as_it_goes() -> None:
    cluster = Cluster([10, 10], 4)
    first = cluster.add(prompt(36), greedy(12))
    assert first.why_span is None and first.why_mode is None
    cluster.step()
    assert (first.why_span, first.why_mode) == (SpanReason.NO_RATES, ModeReason.ONE_RANK)
    while first.table is not None and first.table.width == 1:
        cluster.step()
    cluster.step()
    assert (first.why_span, first.why_mode) == (SpanReason.GREW, ModeReason.ONE_QUERY)
    cluster.settle()
    again = cluster.add(prompt(36), greedy(2))
    cluster.step()
    assert again.why_span is SpanReason.PREFIX
    cluster.settle()
    long = cluster.add(prompt(60, 7), greedy(2))
    cluster.step()
    assert (long.why_span, long.why_mode) == (SpanReason.NO_ROOM, ModeReason.FIRST)


def test_a_drain_moves() -> None:
    cluster = Cluster([20, 20], 4)
    request = cluster.add(prompt(12), greedy(30))
    cluster.step()
    assert request.table is not None
    cluster.scheduler.drain(request.table.last_rank)
    for _ in range(6):
        cluster.step()
    assert request.why_span is SpanReason.MOVED


def test_reasons_are_words_and_sentences() -> None:
    for kind in (SpanReason, ModeReason):
        texts = [reason.text for reason in kind]
        assert len(set(texts)) == len(texts) and all(len(text) < 80 for text in texts)
        assert all(reason == reason.value and reason.value.islower() for reason in kind)
