"""The plain rule, case by case, and that a forced mode is obeyed everywhere."""

from __future__ import annotations

import itertools

import pytest

from ds_cp.engine.policy import ModePolicy


def policy(
    mode: str = "auto",
    ring_pass: str = "auto",
    local_threshold: int | None = None,
    num_hosts: int = 1,
    heads: tuple[int, int] = (8, 2),
) -> ModePolicy:
    return ModePolicy(mode, ring_pass, local_threshold, num_hosts, *heads)


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
