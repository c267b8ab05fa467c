"""Fair shares between clients, by the scheduler alone."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.plan import StepPlan
from ds_cp.scheduler.fairness import KEPT, Shares, Turns
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.request import Request
from tests.helpers.cluster import Cluster, greedy, prompt
from tests.unit.scheduler.test_scheduler import chunks_of, stepped

# --- turns


def test_one_client_is_served_in_the_order_of_arrival() -> None:
    turns, rng = Turns(), random.Random(1)
    taken = []
    for _ in range(500):
        taken.append(turns.take("a", rng.randint(1, 1000), rng.random() < 0.1))
        if rng.random() < 0.7:
            turns.serve(rng.choice(taken))
    assert taken == sorted(taken)


def test_who_asks_for_little_is_next_and_who_asks_for_much_is_not_forgotten() -> None:
    turns = Turns()
    heavy = [turns.take("heavy", 7000, False) for _ in range(20)]
    turns.serve(heavy[2])
    light = [turns.take("light", 100, False) for _ in range(300)]
    assert heavy[2] <= light[0] < heavy[3]
    between = [sum(a <= turn < b for turn in light) for a, b in pairwise(heavy[2:])]
    assert between[:4] == [70, 70, 70, 70], "as many tokens of each"
    late = turns.take("third", 1, False)
    assert late == light[0], "nobody is behind for coming later"


def test_what_was_used_is_forgotten_when_nothing_is_left_to_do() -> None:
    turns = Turns()
    turns.take("a", 10**6, True)
    later = turns.take("b", 5, True)
    assert later >= 10**6 and turns.take("a", 1, False) == later


def test_those_are_remembered_that_asked_for_most() -> None:
    turns = Turns()
    heavy = [turns.take(f"heavy {n}", 10**6, False) for n in range(KEPT // 2)]
    for n in range(20 * KEPT):
        turns.serve(turns.take(f"light {n}", 1, False))
        assert len(turns) <= 2 * KEPT
    again = [turns.take(f"heavy {n}", 1, False) for n in range(KEPT // 2)]
    assert all(b == a + 10**6 for a, b in zip(heavy, again, strict=True))


# --- shares

amounts = st.lists(st.floats(0, 1000), min_size=2, max_size=2)


@given(amounts, st.dictionaries(st.sampled_from("abcde"), amounts, min_size=1))
def test_shares_are_max_min_fair(rooms: list[float], wants: dict[str, list[float]]) -> None:
    shares = Shares(rooms, wants)
    for rank, room in enumerate(rooms):
        parts = {client: shares.most(client, (rank,)) for client in wants}
        asked = {client: wants[client][rank] for client in wants}
        assert sum(parts.values()) == pytest.approx(min(room, sum(asked.values())), abs=1e-6)
        short = [client for client in wants if parts[client] < asked[client] - 1e-6]
        most = max(parts.values())
        assert all(parts[client] >= most - 1e-6 for client in short), "who wants more has the most"


def test_what_a_client_took_is_gone() -> None:
    shares = Shares([8.0, 8.0], {"a": [100.0, 2.0], "b": [100.0, 0.0]})
    assert shares.most("a", (0,)) == 4 and shares.most("a", (0, 1)) == 2
    assert shares.is_fresh("a")
    shares.spend("a", 0, 3)
    shares.spend("c", 0, 3)
    assert shares.most("a", (0,)) == 1 and not shares.is_fresh("a")
    shares.spend("a", 0, 3)
    assert shares.most("a", (0,)) == 0
    assert shares.most("c", (0,)) == float("inf") and shares.is_fresh("b")


# --- the scheduler


def order_of(cluster: Cluster, clients: dict[int, str]) -> str:
    """The clients of the started requests."""
    return "".join(clients[number] for number in cluster.started)


def flood(cluster: Cluster, asked: list[tuple[str, int]], **options: Any) -> dict[int, str]:
    return {
        cluster.add(prompt(tokens, i), greedy(2), client=client, **options).number: client
        for i, (client, tokens) in enumerate(asked)
    }


@pytest.mark.parametrize("pacer", [None, ChunkPacer(2.0)], ids=["unpaced", "paced"])
def test_a_client_with_many_requests_does_not_hold_up_another(pacer: ChunkPacer | None) -> None:
    cluster = Cluster([64], max_num_seqs=2, budget=20, pacer=pacer)
    clients = flood(cluster, [("a", 40)] * 10 + [("b", 40)] * 3)
    cluster.settle()
    order = order_of(cluster, clients)
    assert order.rindex("b") <= 7, order
    assert len(order) == 13
    cluster.check_outputs()


def test_without_clients_the_older_goes_first() -> None:
    for client in ("", "a"):
        cluster = Cluster([64], max_num_seqs=2, budget=20)
        flood(cluster, [(client, n) for n in (40, 3, 60, 9, 30)])
        cluster.settle()
        assert cluster.started == sorted(cluster.started)


def test_one_client_costs_nothing() -> None:
    """The plans of all are the same whether their client is known or not."""

    def plans(client: str) -> list[StepPlan]:
        cluster = Cluster([12, 12], max_num_seqs=4, budget=16)
        flood(cluster, [(client, n) for n in (40, 3, 60, 9, 30, 14, 2)])
        return cluster.settle()

    assert plans("") == plans("a")


def steps_until_computed(cluster: Cluster, request: Request) -> list[StepPlan]:
    plans = []
    while request.prefilling:
        plans.append(stepped(cluster))
        assert len(plans) < 500
    return plans


def test_a_step_is_shared_between_prompts_of_two_clients() -> None:
    cluster = Cluster([200], budget=20, max_num_seqs=8)
    long = cluster.add(prompt(400, 1), greedy(2), client="a")
    more = cluster.add(prompt(200, 2), greedy(2), client="a")
    stepped(cluster)
    short = cluster.add(prompt(40, 3), greedy(2), client="b")
    plans = steps_until_computed(cluster, short)
    assert chunks_of(plans, short) == [10] * 4
    assert chunks_of(plans, long) == [10] * 4, "the other half goes on"
    assert not chunks_of(plans, more)
    assert chunks_of([stepped(cluster)], long) == [19], "what nobody else wants; one decodes"
    cluster.settle()
    cluster.check_outputs()


def test_three_clients_share_whatever_their_numbers_of_requests() -> None:
    cluster = Cluster([400], budget=30, max_num_seqs=20)
    asked = [("a", 100)] * 6 + [("b", 100)] * 2 + [("c", 100)]
    clients = flood(cluster, asked)
    plans = [stepped(cluster) for _ in range(9)]
    done = dict.fromkeys("abc", 0)
    for number, client in clients.items():
        done[client] += sum(chunks_of(plans, cluster.lives[number].request))
    assert sum(done.values()) >= 9 * 30 - 9, "nothing is left unused"
    assert max(done.values()) - min(done.values()) <= 30 + 15, done  # of the first two steps
    cluster.settle()


def test_prompts_on_different_ranks_do_not_share() -> None:
    cluster = Cluster([60, 60], budget=20)
    one = cluster.add(prompt(200, 1), greedy(2), client="a")
    other = cluster.add(prompt(200, 2), greedy(2), client="b")
    plans = [stepped(cluster) for _ in range(5)]
    assert one.workers != other.workers
    assert chunks_of(plans[1:], one) == chunks_of(plans[1:], other) == [20] * 4


def test_who_finds_no_room_leaves_its_part_to_others() -> None:
    cluster = Cluster([100], budget=20)  # 400 tokens
    long = cluster.add(prompt(380, 1), greedy(2), client="a")
    stepped(cluster)
    cluster.add(prompt(100, 2), greedy(2), client="b")
    plans = [stepped(cluster) for _ in range(6)]
    assert chunks_of(plans[1:], long) == [20] * 5
    cluster.settle()


def test_a_later_priority_has_no_part() -> None:
    cluster = Cluster([200], budget=20)
    long = cluster.add(prompt(200, 1), greedy(2), client="a")
    stepped(cluster)
    cluster.add(prompt(100, 2), greedy(2), client="b", priority=1)
    urgent = cluster.add(prompt(30, 3), greedy(2), client="c", priority=-1)
    plans = [stepped(cluster) for _ in range(3)]
    assert chunks_of(plans, urgent) == [20, 10]
    assert chunks_of(plans, long) == [10, 19]
    cluster.settle()
    cluster.check_outputs()


@pytest.mark.parametrize(("light", "least", "most"), [("heavy", 25, 60), ("light", 1, 4)])
def test_a_short_prompt_behind_a_flood(light: str, least: int, most: int) -> None:
    """16 prompts of 400 tokens were asked for, 128 of a step: a prompt of 60 takes two steps more
    if its client is another, else those of all others."""
    cluster = Cluster([1000, 1000], budget=64, max_num_seqs=40)
    flood(cluster, [("heavy", 400)] * 16)
    for _ in range(3):
        stepped(cluster)
    short = cluster.add(prompt(60, 99), greedy(2), client=light)
    steps = len(steps_until_computed(cluster, short))
    assert least <= steps <= most, steps
    cluster.settle()
    cluster.check_outputs()
