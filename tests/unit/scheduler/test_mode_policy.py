"""The plain rule, case by case, and that a forced mode is obeyed everywhere."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from ds_cp.cost import CostModel
from ds_cp.scheduler.mode_policy import ModePolicy, Seats


def policy(
    mode: str = "auto",
    ring_pass: str = "auto",
    local_threshold: int | None = None,
    num_hosts: int = 1,
    heads: tuple[int, int] = (8, 2),
    cost: CostModel | None = None,
) -> ModePolicy:
    return ModePolicy(mode, ring_pass, local_threshold, num_hosts, *heads, cost)


def rates(
    flops: float = 1e12, bandwidth: float = 1e10, heads: tuple[int, int] = (8, 2), element: int = 2
) -> CostModel:
    return CostModel(flops, bandwidth, 1e-6, 16, *heads, 64, 10**8, element)


@pytest.mark.parametrize(
    ("ranks", "hosts", "new", "past", "want"),
    [
        (1, 1, 1, 500, "local"),
        (1, 4, 500, 0, "local"),
        (2, 1, 1, 500, "tree"),
        (4, 2, 1, 500, "tree"),
        (2, 1, 500, 0, "ring"),
        (8, 1, 500, 0, "ring"),  # one host: ring however many ranks
        (2, 2, 500, 0, "ring"),  # two hosts, but only two ranks
        (3, 2, 500, 0, "tree"),
        (8, 2, 2, 500, "tree"),
    ],
)
def test_auto(ranks: int, hosts: int, new: int, past: int, want: str) -> None:
    assert policy(num_hosts=hosts).decide(ranks, new, past).key[0] == want


def test_forced_modes_are_obeyed_in_prefill_and_decode() -> None:
    for mode, ranks, hosts, new, past in itertools.product(
        ("local", "ring", "tree"), (1, 2, 5), (1, 3), (1, 7, 900), (0, 1, 900)
    ):
        assert policy(mode, num_hosts=hosts).decide(ranks, new, past).key[0] == mode


@pytest.mark.parametrize("ring_pass", ["kv", "q"])
def test_forced_pass(ring_pass: str) -> None:
    for new, past in itertools.product((1, 50), (0, 1, 900)):
        assert policy("ring", ring_pass).decide(3, new, past).key == ("ring", ring_pass)


def test_pass_is_the_smaller_message() -> None:
    """Q is smaller iff T / (T + P) <= 2G / H: with H = 8, G = 2 at T <= P (2411.01783, eq. 1)."""
    rule = policy("ring", heads=(8, 2))
    assert rule.decide(2, 100, 100).key == ("ring", "q")
    assert rule.decide(2, 101, 100).key == ("ring", "kv")
    assert rule.decide(2, 1, 100).key == ("ring", "q")
    assert rule.decide(2, 100, 0).key == ("ring", "kv"), "a first prefill moves KV"
    many = policy("ring", heads=(32, 2))  # 2G / H = 1 / 8
    assert many.decide(2, 10, 70).key == ("ring", "q")
    assert many.decide(2, 11, 70).key == ("ring", "kv")


def test_queries_do_not_travel_to_one_rank_that_holds_the_keys() -> None:
    """A policy that fills ranks puts all keys on one: passing queries would have it attend all of
    them while the others wait (8,192 tokens over two ranks: 9.5 s instead of 6.7)."""
    shared = replace(rates(3e11, 5e9), in_background=False)
    rule = policy(cost=shared)
    assert rule.decide(2, 900, 4000, 0.5).key == ("ring", "q")
    assert rule.decide(2, 900, 4000, 0.54).key == ("ring", "q"), "about as many each"
    assert rule.decide(2, 900, 4000, 1.0).key == ("ring", "kv")
    assert rule.decide(2, 900, 4000, 0.75).key == ("ring", "kv")
    assert policy().decide(2, 900, 4000, 1.0).key == ("ring", "kv"), "without rates too"
    hosts = policy(num_hosts=2, cost=shared)
    assert hosts.decide(4, 900, 4000, 0.25).key[0] == "tree"
    assert hosts.decide(4, 900, 4000, 0.9).key == ("ring", "kv")
    assert hosts.decide(4, 1, 4000, 0.9).key[0] == "tree", "a decode asks who holds keys"
    # Where keys are dear to move, a few queries do travel.
    slow = policy(cost=replace(shared, bytes_per_s=1e7))
    assert slow.decide(2, 20, 100_000, 1.0).key == ("ring", "q")
    for forced in ("kv", "q"):
        assert policy("ring", forced).decide(2, 900, 4000, 1.0).key == ("ring", forced)


def test_tree_and_local_have_no_pass() -> None:
    assert policy("tree", "q").decide(3, 9, 9).key[1] == "kv"
    assert policy("local", "q").decide(1, 9, 9).key[1] == "kv"


def test_may_be_local() -> None:
    assert policy().may_be_local(10**9)
    assert policy(local_threshold=100).may_be_local(100)
    assert not policy(local_threshold=100).may_be_local(101)
    assert not policy(local_threshold=0).may_be_local(1)
    assert policy("local", local_threshold=5).may_be_local(6), "a forced mode beats the threshold"
    assert not policy("ring").may_be_local(1)
    assert not policy("tree", local_threshold=100).may_be_local(1)


def test_pass_is_kv_where_that_hides_under_attention() -> None:
    """Algorithm 1 of arXiv 2411.01783 with its achieved rates for Llama 3 405B on 4 hosts of 8
    GPUs (Table 5: 507 TFLOP/s, 26.1 GB/s): queries travel for a few new tokens only."""
    heads = (128, 8)
    cost = rates(507e12, 26.1e9, heads)
    rule = policy("ring", heads=heads, cost=cost)
    whole = 128_000
    chosen = {
        new: rule.decide(4, new, whole - new).key[1] for new in (1280, 3200, 4160, 6400, 25600)
    }
    assert chosen == {1280: "q", 3200: "q", 4160: "q", 6400: "kv", 25600: "kv"}
    # T >= N C G e / (2 H BW) = 4 * 507e12 * 8 * 2 / (2 * 128 * 26.1e9)
    threshold = 4 * 507e12 * 8 * 2 / (2 * 128 * 26.1e9)
    assert 4856 < threshold < 4857
    assert [rule.decide(4, new, whole - new).key[1] for new in (4856, 4857)] == ["q", "kv"]
    # on a slow machine with a fast link nothing but the size of the messages is left to decide
    slow = policy("ring", heads=heads, cost=rates(1e6, 26.1e9, heads))
    assert slow.decide(4, 1, whole).key[1] == "kv", "everything hides"


def test_a_prompt_that_may_not_be_local_takes_all_ranks() -> None:
    for mode in ("ring", "tree"):
        assert policy(mode, cost=rates()).width(4, 10, 0, 1, True).ranks == 4
    threshold = policy(local_threshold=100)
    assert threshold.width(4, 60, 40, 1, True).ranks == 1
    assert threshold.width(4, 60, 41, 1, True).ranks == 4
    assert threshold.width(4, 60, 40, 1, False).ranks == 1


def test_local_takes_one_rank_whatever_pays() -> None:
    assert policy("local", cost=rates()).width(4, 10**6, 0, 1, False).ranks == 1


def test_a_prompt_alone_takes_as_many_ranks_as_pay() -> None:
    cost = rates()
    rule = policy(cost=cost)
    assert cost.best_ranks(8, 100_000, 0, 1) == 8
    assert rule.width(8, 100_000, 0, 1, False).ranks == 8
    assert rule.width(8, 100_000, 0, 1, True).ranks == 1, "others want the other ranks"
    assert rule.width(8, 100_000, 0, 1, False, 2).ranks == 2, "two have a core"
    assert rule.width(8, 100_000, 0, 1, False, 1).ranks == 1
    assert policy().width(8, 100_000, 0, 1, False).ranks == 1, "nothing was measured"
    assert policy(cost=cost, local_threshold=200_000).width(8, 10**5, 0, 1, False).ranks == 1
    for new, past, answer in itertools.product((10, 1000, 10**5), (0, 10**4), (1, 10**4)):
        pay = rule.width(4, new, past, answer, False).ranks
        assert pay == cost.best_ranks(4, new, past, answer)


@pytest.mark.parametrize(
    ("load", "asleep"),
    [
        ([0, 0, 0, 0, 0, 0], set()),
        ([5, 0, 0, 0, 0, 0], set()),
        ([5, 0, 3, 0, 0, 0], {1, 3}),
        ([5, 1, 3, 9, 0, 0], set()),
        ([5, 0, 3, 0, 1, 1], {1, 3}),
    ],
)
def test_ranks_without_a_core_of_their_own_sleep(load: list[int], asleep: set[int]) -> None:
    """Four ranks on one host and two on another, where two can compute at once."""
    assert Seats(("a", "a", "a", "a", "b", "b"), 2).asleep(load) == asleep
    assert [Seats(("a", "a", "a", "b"), n).at_work for n in (1, 2, 4)] == [2, 3, 4]


def test_what_spans_without_need_is_gathered() -> None:
    """Unless its mode is forced, it is longer than what may be local, or ranks pay: attention over
    a million tokens of a slow rank against two exchanges of a microsecond a layer."""
    assert policy().gathers(2, 5000)
    assert not policy().gathers(1, 5000)
    assert not policy("tree").gathers(2, 5000)
    assert not policy(local_threshold=4000).gathers(2, 5000)
    assert policy(cost=rates()).gathers(2, 100)
    assert not policy(cost=rates(flops=1e9)).gathers(2, 10**6)
