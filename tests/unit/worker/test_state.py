"""What every rank makes of a plan, worked out by hand, and what every step must satisfy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_cp.kv import SequenceTable
from ds_cp.layout import Blocks
from ds_cp.plan import (
    Begin,
    Chunk,
    Decodes,
    Fork,
    Outcome,
    RankTimes,
    Sampled,
    Sampling,
    StepPlan,
    Transfer,
)
from ds_cp.worker.outcome import HEAD, Times, pack, rows_of, unpack, width_of
from ds_cp.worker.sampler import Score
from ds_cp.worker.state import NO_TOKEN, Item, StepWork, WorkerState, check_item
from tests.helpers.cluster import MODES, PLACEMENTS, Cluster, prompt, sampled

PLAIN = Sampling()


class Ranks:
    """Three worker states that get the same plans."""

    def __init__(self, block_size: int = 4, count: int = 3) -> None:
        self.states = [WorkerState(rank, block_size) for rank in range(count)]
        self.steps = 0

    def run(self, **parts: tuple) -> list[StepWork]:
        self.steps += 1
        plan = StepPlan(self.steps, **parts)
        return [state.apply(plan) for state in self.states]

    def begin(self, number: int, length: int, rank: int = 0, **more: object) -> list[StepWork]:
        """A request whose whole prompt is computed, in its first blocks, on one rank."""
        size = self.states[0].block_size
        homes = tuple((rank, 10 * number + i) for i in range(-(-length // size)))
        begin = Begin(number, tuple(range(length)), length, (), 0, Sampling(**more))  # type: ignore[arg-type]
        chunk = Chunk(number, "local", "kv", ((rank, ((0, length),)),), homes, True)
        return self.run(begins=(begin,), chunks=(chunk,))

    def decode(self, *numbers: int, mode: str = "local", **parts: tuple) -> list[StepWork]:
        return self.run(decodes=(Decodes(mode, "kv", numbers),), **parts)


def draws(work: StepWork) -> list[tuple[int, int, int]]:
    return [(d.sequence.number, d.rank, d.index) for d in work.draws]


def handoffs(work: StepWork) -> list[tuple[int, int, int]]:
    return [(h.sequence.number, h.source, h.target) for h in work.handoffs]


def five_and_three(owners: tuple) -> Item:
    """Blocks of one token: five are stored on ranks 0 and 2, three more come."""
    ranks = Ranks(block_size=1)
    homes = ((0, 8), (0, 9), (2, 0), (2, 1), (2, 2))
    begin = Begin(1, tuple(range(11, 20)), 9, homes, 5, PLAIN)
    chunk = Chunk(1, "ring", "q", owners, ((0, 10), (2, 3), (2, 12)), False)
    works = ranks.run(begins=(begin,), chunks=(chunk,))
    items = [work.items[0] for work in works]
    assert all(item.shards == items[0].shards for item in items), "ranks disagree"
    assert [len(work.items) for work in works] == [1, 1, 1], "spanning: everybody takes part"
    assert not any(work.draws for work in works)
    return items[0]


def test_a_spanning_chunk_by_hand() -> None:
    item = five_and_three(((0, ((5, 1),)), (2, ((6, 2),))))
    check_item(item)
    assert (item.mode, item.ring_pass, item.start, item.count, item.draws) == (
        "ring", "q", 5, 3, False
    )  # fmt: skip
    zero, two = item.shards
    assert item.shard(0) is zero and item.shard(2) is two and item.shard(1) is None
    assert (zero.rank, zero.q_runs, zero.new_runs, zero.new) == (0, ((5, 1),), ((5, 1),), 1)
    assert list(zero.blocks) == [(8, 0, 1), (9, 1, 1), (10, 5, 1)]
    assert (two.rank, two.q_runs, two.new_runs, two.new) == (2, ((6, 2),), ((6, 2),), 2)
    assert list(two.blocks) == [(0, 2, 1), (1, 3, 1), (2, 4, 1), (3, 6, 1), (12, 7, 1)]
    assert not item.ships


def test_a_chunk_whose_kv_travels() -> None:
    """Rank 1 computes most, and has no home of any."""
    item = five_and_three(((0, ((5, 1),)), (1, ((6, 2),))))
    check_item(item)
    assert item.ships and [s.rank for s in item.shards] == [0, 1, 2]
    assert (item.shards[1].q_runs, len(item.shards[1].blocks)) == (((6, 2),), 0)
    assert (item.shards[2].q_runs, item.shards[2].new_runs) == ((), ((6, 2),))


ITEM = five_and_three(((0, ((5, 1),)), (2, ((6, 2),))))


def change(which: int, **fields: object) -> Item:
    shards = list(ITEM.shards)
    shards[which] = replace(shards[which], **fields)  # type: ignore[arg-type]
    return replace(ITEM, shards=tuple(shards))


@pytest.mark.parametrize(
    "broken",
    [
        change(0, q_runs=()),  # nobody owns 5
        change(0, q_runs=((5, 2),)),  # two own 6
        change(1, new_runs=((6, 1),)),  # 7 has no home
        change(0, new_runs=((4, 2),)),  # an old one is said to be new
        change(1, blocks=Blocks(list(ITEM.shards[1].blocks)[:-1])),  # some are stored nowhere
        replace(ITEM, start=4),
        replace(ITEM, count=2),
        replace(ITEM, shards=ITEM.shards[:1]),
    ],
)
def test_check_item_sees_it(broken: Item) -> None:
    with pytest.raises(AssertionError):
        check_item(broken)


def test_a_last_chunk_needs_an_owner_of_its_last_token() -> None:
    chunk = Chunk(1, "local", "kv", ((0, ((4, 2),)),), ((0, 0),), True)
    with pytest.raises(ValueError, match="nobody owns position 1"):
        Ranks().run(begins=(Begin(1, (5, 6), 2, (), 0, PLAIN),), chunks=(chunk,))


def test_a_local_request_concerns_its_rank_alone_but_all_know_of_it() -> None:
    ranks = Ranks()
    works = ranks.begin(1, 6, rank=1)
    assert [len(work.items) for work in works] == [0, 1, 0]
    (item,) = works[1].items
    assert (item.mode, item.start, item.count, item.draws) == ("local", 0, 6, True)
    assert [draws(work) for work in works] == [[(1, 1, 0)]] * 3
    for index in (1, 2):
        works = ranks.decode(1)
        assert [[s.number for s in work.decodes] for work in works] == [[], [1], []]
        assert not any(work.items for work in works)
        assert [draws(work) for work in works] == [[(1, 1, index)]] * 3
        assert not any(map(handoffs, works)), "the rank that drew it computes it"
    tables = [state.sequences[1].table for state in ranks.states]
    assert all((t.homes, t.num_tokens) == ([(1, 10), (1, 11)], 8) for t in tables)


def test_a_token_is_handed_over_when_the_request_grows_onto_another_rank() -> None:
    ranks = Ranks()
    ranks.begin(1, 4)
    works = ranks.decode(1, mode="tree", grown=((1, (2, 7)),))
    assert [handoffs(work) for work in works] == [[(1, 0, 2)]] * 3
    assert [draws(work) for work in works] == [[(1, 2, 1)]] * 3
    (item,) = works[1].items
    assert [(s.rank, s.q_runs, s.blocks.runs()) for s in item.shards] == [
        (0, (), ((0, 4),)), (2, ((4, 1),), ((4, 1),)),
    ]  # fmt: skip
    assert item.draws and (item.start, item.count) == (4, 1)
    works = ranks.decode(1, mode="tree")
    assert not any(map(handoffs, works)), "it is drawn where it is needed now"


def test_several_requests_draw_in_the_order_of_the_plan() -> None:
    ranks = Ranks()
    for number in (3, 1, 2):
        ranks.begin(number, 5, rank=number - 1)
    parts = (Decodes("local", "kv", (3, 1)), Decodes("tree", "kv", (2,)))
    works = ranks.run(decodes=parts)
    assert [draws(work) for work in works] == [[(3, 2, 1), (1, 0, 1), (2, 1, 1)]] * 3
    assert [[s.number for s in work.decodes] for work in works] == [[1], [], [3]]
    assert [[i.sequence.number for i in work.items] for work in works] == [[2]] * 3


def test_a_fork_shares_what_is_before_the_last_token() -> None:
    ranks = Ranks()
    ranks.begin(1, 6)
    how = Sampling(seed=9)
    ranks.run(decodes=(Decodes("local", "kv", (1,)),), forks=(Fork(1, 2, how),))
    for state in ranks.states:
        parent, child = state.sequences[1], state.sequences[2]
        assert (child.table.homes, child.table.num_tokens) == (parent.table.homes[:2], 5)
        assert parent.table.num_tokens == 7, "the parent goes on in the same step"
        assert (child.tokens, child.prompt_length, child.drawn) == (tuple(range(6)), 6, 0)
        assert child.tokens is parent.tokens, "a long prompt is kept once, for all its answers"
        assert child.sampling is how and child.last == NO_TOKEN and child.outputs == []
    copy = Transfer((2,), 1, (0, 11), (1, 3))
    works = ranks.decode(1, 2, mode="tree", transfers=(copy,))
    assert [draws(work) for work in works] == [[(1, 0, 2), (2, 1, 0)]] * 3
    assert not any(map(handoffs, works)), "its first token is the prompt's last, known to all"
    assert ranks.states[0].sequences[1].table.homes == [(0, 10), (0, 11)], "a table of its own"


@pytest.mark.parametrize("length", [1, 4, 5])
def test_a_fork_at_the_end_of_a_block(length: int) -> None:
    ranks = Ranks()
    ranks.begin(1, length)
    ranks.run(forks=(Fork(1, 2, PLAIN),))
    table = ranks.states[2].sequences[2].table
    blocks = {1: 0, 4: 1, 5: 1}[length]
    assert (len(table.homes), table.num_tokens) == (blocks, length - 1)


def test_blocks_move_for_all_who_hold_them() -> None:
    ranks = Ranks()
    ranks.begin(1, 8)
    ranks.run(forks=(Fork(1, 2, PLAIN),))
    move = Transfer((1, 2, 77), 0, (0, 10), (2, 5))  # 77 was preempted after this was decided
    last = Transfer((1,), 1, (0, 11), (1, 6))
    unheld = Transfer((), 3, (0, 3), (1, 9))  # of the cache
    works = ranks.run(
        transfers=(move, last, unheld), grown=((1, (1, 7)),), decodes=(Decodes("tree", "kv", (1,)),)
    )
    assert ranks.states[1].sequences[1].table.homes == [(2, 5), (1, 6), (1, 7)]
    assert ranks.states[1].sequences[2].table.homes == [(2, 5), (0, 11)]
    assert [handoffs(work) for work in works] == [[(1, 0, 1)]] * 3
    (item,) = works[0].items
    assert [(s.rank, s.blocks.runs(), s.blocks.extents(4)) for s in item.shards] == [
        (1, ((4, 5),), ((24, 5),)), (2, ((0, 4),), ((20, 4),)),
    ]  # fmt: skip


def test_who_gave_way_begins_again_where_it_was() -> None:
    """Ended and begun in one plan: with its outputs, so that the next draw has the next number."""
    ranks = Ranks()
    ranks.begin(1, 4)
    ranks.decode(1, grown=((1, (0, 20)),))
    tokens = (0, 1, 2, 3, 50, 51)
    begin = Begin(1, tokens, 4, ((1, 0),), 4, PLAIN)
    chunk = Chunk(1, "local", "kv", ((1, ((4, 2),)),), ((1, 1),), True)
    works = ranks.run(ended=(1, 99), begins=(begin,), chunks=(chunk,))
    assert [draws(work) for work in works] == [[(1, 1, 2)]] * 3
    for state in ranks.states:
        sequence = state.sequences[1]
        assert (sequence.outputs, sequence.prompt, sequence.drawn) == ([50, 51], (0, 1, 2, 3), 3)
    works = ranks.decode(1)
    assert draws(works[0]) == [(1, 1, 3)] and not works[0].handoffs
    ranks.run(ended=(1,))
    assert not any(state.sequences for state in ranks.states)


def test_what_was_drawn_elsewhere_is_announced_in_order_and_once() -> None:
    ranks = Ranks()
    ranks.begin(1, 4, presence_penalty=1.0)
    news = ((1, 0, 70), (1, 0, 70), (1, 2, 72), (9, 0, 1), (1, 1, 71))
    ranks.run(seen=news)
    assert [m.sequences[1].outputs for m in ranks.states] == [[70, 71]] * 3
    ranks.run(seen=((1, 2, 72),))
    assert ranks.states[2].sequences[1].outputs == [70, 71, 72]


def test_prompt_scores_leave_out_the_last_token_and_the_answer() -> None:
    """Row p scores the token after it; a restart computes the answer again, which has no score."""
    ranks = Ranks(block_size=2)
    how = Sampling(prompt_logprobs=0)
    tokens = (1, 2, 3, 4, 5, 60, 61)  # five of the prompt
    begin = Begin(1, tokens, 5, (), 0, how)
    first = Chunk(1, "ring", "kv", ((0, ((0, 1), (3, 1))), (1, ((1, 2),))),
                  ((0, 0), (1, 0)), False)  # fmt: skip
    works = ranks.run(begins=(begin,), chunks=(first,))
    assert [(s[0].number, *s[1:]) for s in works[2].scored] == [
        (1, 0, 1, 0), (1, 3, 1, 0), (1, 1, 2, 1),
    ]  # fmt: skip
    last = Chunk(1, "ring", "kv", ((1, ((4, 3),)),), ((1, 1), (1, 2)), True)
    works = ranks.run(chunks=(last,))
    assert not works[0].scored, "position 4 is the prompt's last"
    assert [draws(work) for work in works] == [[(1, 1, 2)]] * 3


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_blocks_kept_from_step_to_step_are_those_of_a_table_made_anew(placement: str) -> None:
    """Plans of a busy cluster again, by a worker state whose tables forget after each step."""
    cluster = Cluster([7, 5, 6], 2, mode=MODES[2], placement=placement, budget=9)
    for i in range(12):
        cluster.ask(prompt(1 + 2 * i % 11, i % 3), sampled(9, n=1 + i % 2))
    begun = cluster.step()
    assert begun is not None
    cluster.scheduler.drain(1)
    plans = [begun, *cluster.settle()]
    state, theirs = WorkerState(0, 2), WorkerState(0, 2)
    items = 0
    for plan in plans:
        for sequence in theirs.sequences.values():
            old = sequence.table
            sequence.table = SequenceTable(2, old.homes, old.num_tokens)
        one, other = state.apply(plan), theirs.apply(plan)
        assert [i.shards for i in one.items] == [i.shards for i in other.items]
        items += len(one.items)
        assert draws(one) == draws(other) and handoffs(one) == handoffs(other)
    assert items > 100


def test_all_ranks_know_which_ranks_work() -> None:
    """Each of these reports its time, and rank 0 waits for all of them: tokens, a part in spanning
    attention, blocks to copy. A request that only decodes on one rank concerns no other."""
    ranks = Ranks()
    assert [work.ranks for work in ranks.begin(1, 6, rank=1)] == [{1}] * 3
    assert [work.ranks for work in ranks.begin(2, 3, rank=2)] == [{2}] * 3
    assert [work.ranks for work in ranks.decode(1)] == [{1}] * 3
    assert [work.ranks for work in ranks.run()] == [set()] * 3
    move = Transfer((1,), 0, (1, 10), (0, 5))
    assert [work.ranks for work in ranks.run(transfers=(move,))] == [{0, 1}] * 3
    works = ranks.decode(1, mode="tree")
    assert [work.ranks for work in works] == [{0, 1}] * 3, "its KV is on two ranks now"
    chunk = Chunk(3, "ring", "kv", ((0, ((0, 2),)), (2, ((2, 2),))), ((1, 30),), False)
    works = ranks.run(begins=(Begin(3, tuple(range(9)), 9, (), 0, PLAIN),), chunks=(chunk,))
    assert [work.ranks for work in works] == [{0, 1, 2}] * 3, "owners, and the home of the KV"


def test_the_slowest_rank_gives_the_time_of_a_step() -> None:
    """Rows of three ranks: the middle one draws nothing and works longest."""
    ranks = Ranks()
    ranks.begin(1, 4, rank=0)
    chunk = Chunk(2, "local", "kv", ((1, ((0, 4),)),), ((1, 20),), False)
    begin = Begin(2, tuple(range(9)), 9, (), 0, PLAIN)
    works = ranks.run(
        begins=(begin,), chunks=(chunk,), grown=((1, (0, 30)),),
        decodes=(Decodes("local", "kv", (1,)),),
    )  # fmt: skip
    assert [rows_of(works[0], rank) for rank in range(3)] == [HEAD + 1, HEAD, 0]
    rows = {
        0: pack(Times(0.25, 0.125), [Sampled(1, 7, 0.0)], [], 0).tolist(),
        1: pack(Times(3.0, 2.5, 0.75, (1, 2**40, 3, 4, 5, 6), 7), [], [], 0).tolist(),
    }
    assert unpack(5, works[0], 0, rows) == Outcome(
        5, (Sampled(1, 7, 0.0),), (), 3.0, 2.5,
        ranks=(
            RankTimes(0, 0.25, 0.0, (0,) * 6), RankTimes(1, 3.0, 0.75, (1, 2**40, 3, 4, 5, 6), 7),
        ),
    )  # fmt: skip


def test_a_prompt_that_cannot_be_scored_is_named() -> None:
    ranks = Ranks()
    [work, *_] = ranks.begin(1, 4, rank=0, prompt_logprobs=1)
    scores = [Score(-0.5, ((3, -0.5),)), None, Score(-1.5, ((4, -1.0),))]
    rows = pack(Times(1.0, 0.5), [Sampled(1, 7, 0.0)], scores, width_of(work))
    outcome = unpack(1, work, 1, {0: rows.tolist()})
    assert (outcome.failed, outcome.scored) == ((1,), ())
    rows = pack(Times(1.0, 0.5), [Sampled(1, 7, 0.0)], [scores[0]] * 3, width_of(work))
    outcome = unpack(1, work, 1, {0: rows.tolist()})
    assert (outcome.failed, outcome.scored[0].rows) == ((), ((-0.5, ((3, -0.5),)),) * 3)
