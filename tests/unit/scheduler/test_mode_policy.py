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
    assert policy(num_hosts=hosts).choose(ranks, new, past)[0] == want


def test_forced_modes_are_obeyed_in_prefill_and_decode() -> None:
    for mode, ranks, hosts, new, past in itertools.product(
        ("local", "ring", "tree"), (1, 2, 5), (1, 3), (1, 7, 900), (0, 1, 900)
    ):
        assert policy(mode, num_hosts=hosts).choose(ranks, new, past)[0] == mode


@pytest.mark.parametrize("ring_pass", ["kv", "q"])
def test_forced_pass(ring_pass: str) -> None:
    for new, past in itertools.product((1, 50), (0, 1, 900)):
        assert policy("ring", ring_pass).choose(3, new, past) == ("ring", ring_pass)


def test_pass_is_the_smaller_message() -> None:
    """Q is smaller iff T / (T + P) <= 2G / H: with H = 8, G = 2 at T <= P (2411.01783, eq. 1)."""
    rule = policy("ring", heads=(8, 2))
    assert rule.choose(2, 100, 100) == ("ring", "q")
    assert rule.choose(2, 101, 100) == ("ring", "kv")
    assert rule.choose(2, 1, 100) == ("ring", "q")
    assert rule.choose(2, 100, 0) == ("ring", "kv"), "a first prefill moves KV"
    many = policy("ring", heads=(32, 2))  # 2G / H = 1 / 8
    assert many.choose(2, 10, 70) == ("ring", "q")
    assert many.choose(2, 11, 70) == ("ring", "kv")


def test_queries_do_not_travel_to_one_rank_that_holds_the_keys() -> None:
    """A policy that fills ranks puts all keys on one: passing queries would have it attend all of
    them while the others wait (8,192 tokens over two ranks: 9.5 s instead of 6.7)."""
    shared = replace(rates(3e11, 5e9), in_background=False)
    rule = policy(cost=shared)
    assert rule.choose(2, 900, 4000, 0.5) == ("ring", "q")
    assert rule.choose(2, 900, 4000, 0.54) == ("ring", "q"), "about as many each"
    assert rule.choose(2, 900, 4000, 1.0) == ("ring", "kv")
    assert rule.choose(2, 900, 4000, 0.75) == ("ring", "kv")
    assert policy().choose(2, 900, 4000, 1.0) == ("ring", "kv"), "without rates too"
    hosts = policy(num_hosts=2, cost=shared)
    assert hosts.choose(4, 900, 4000, 0.25)[0] == "tree"
    assert hosts.choose(4, 900, 4000, 0.9) == ("ring", "kv")
    assert hosts.choose(4, 1, 4000, 0.9)[0] == "tree", "a decode asks who holds keys"
    # Where keys are dear to move, a few queries do travel.
    slow = policy(cost=replace(shared, bytes_per_s=1e7))
    assert slow.choose(2, 20, 100_000, 1.0) == ("ring", "q")
    for forced in ("kv", "q"):
        assert policy("ring", forced).choose(2, 900, 4000, 1.0) == ("ring", forced)


def test_tree_and_local_have_no_pass() -> None:
    assert policy("tree", "q").choose(3, 9, 9)[1] == "kv"
    assert policy("local", "q").choose(1, 9, 9)[1] == "kv"


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
    chosen = {new: rule.choose(4, new, whole - new)[1] for new in (1280, 3200, 4160, 6400, 25600)}
    assert chosen == {1280: "q", 3200: "q", 4160: "q", 6400: "kv", 25600: "kv"}
    # T >= N C G e / (2 H BW) = 4 * 507e12 * 8 * 2 / (2 * 128 * 26.1e9)
    threshold = 4 * 507e12 * 8 * 2 / (2 * 128 * 26.1e9)
    assert 4856 < threshold < 4857
    assert [rule.choose(4, new, whole - new)[1] for new in (4856, 4857)] == ["q", "kv"]
    # on a slow machine with a fast link nothing but the size of the messages is left to decide
    slow = policy("ring", heads=heads, cost=rates(1e6, 26.1e9, heads))
    assert slow.choose(4, 1, whole)[1] == "kv", "everything hides"


def test_a_prompt_that_may_not_be_local_takes_all_ranks() -> None:
    for mode in ("ring", "tree"):
        assert policy(mode, cost=rates()).ranks_that_pay(4, 10, 0, 1, True) == 4
    threshold = policy(local_threshold=100)
    assert threshold.ranks_that_pay(4, 60, 40, 1, True) == 1
    assert threshold.ranks_that_pay(4, 60, 41, 1, True) == 4
    assert threshold.ranks_that_pay(4, 60, 40, 1, False) == 1


def test_local_takes_one_rank_whatever_pays() -> None:
    assert policy("local", cost=rates()).ranks_that_pay(4, 10**6, 0, 1, False) == 1


def test_a_prompt_alone_takes_as_many_ranks_as_pay() -> None:
    cost = rates()
    rule = policy(cost=cost)
    assert cost.best_ranks(8, 100_000, 0, 1) == 8
    assert rule.ranks_that_pay(8, 100_000, 0, 1, False) == 8
    assert rule.ranks_that_pay(8, 100_000, 0, 1, True) == 1, "others want the other ranks"
    assert policy().ranks_that_pay(8, 100_000, 0, 1, False) == 1, "nothing was measured"
    assert policy(cost=cost, local_threshold=200_000).ranks_that_pay(8, 10**5, 0, 1, False) == 1
    for new, past, answer in itertools.product((10, 1000, 10**5), (0, 10**4), (1, 10**4)):
        pay = rule.ranks_that_pay(4, new, past, answer, False)
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


def test_what_spans_without_need_is_gathered() -> None:
    """Unless its mode is forced, it is longer than what may be local, or ranks pay: attention over
    a million tokens of a slow rank against two exchanges of a microsecond a layer."""
    assert policy().gathers(2, 5000)
    assert not policy().gathers(1, 5000)
    assert not policy("tree").gathers(2, 5000)
    assert not policy(local_threshold=4000).gathers(2, 5000)
    assert policy(cost=rates()).gathers(2, 100)
    assert not policy(cost=rates(flops=1e9)).gathers(2, 10**6)
