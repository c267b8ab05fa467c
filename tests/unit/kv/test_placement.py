"""Placement policies against token-by-token simulations; whole requests against capacity."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.kv import POLICIES, BlockAllocator, SequenceTable, place, place_block
from ds_cp.layout import LAYOUTS, assign, positions


@dataclass
class Case:
    tokens: int
    open_slots: list[int]
    free_blocks: list[int]
    block_size: int
    last_rank: int
    order: list[int]

    @property
    def room(self) -> list[int]:
        pairs = zip(self.open_slots, self.free_blocks, strict=True)
        return [o + f * self.block_size for o, f in pairs]

    def place(self, policy: str) -> tuple[int, ...] | None:
        return place(
            policy,
            self.tokens,
            open_slots=self.open_slots,
            free_blocks=self.free_blocks,
            block_size=self.block_size,
            last_rank=self.last_rank,
            order=self.order,
        )


@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.integers(0, 3), min_size=1, max_size=6).flatmap(
        lambda free: st.tuples(
            st.just(free), st.integers(-1, len(free) - 1), st.permutations(range(len(free)))
        )
    ),
)
def test_one_block_goes_where_place_would_put_it(
    policy: str, case: tuple[list[int], int, list[int]]
) -> None:
    free, last, order = case
    counts = place(
        policy, 1, open_slots=[0] * len(free), free_blocks=free, block_size=1, last_rank=last,
        order=order,
    )  # fmt: skip
    rank = place_block(policy, free, last, order)
    assert (rank is None) == (counts is None)
    if counts is not None and rank is not None:
        assert counts[rank] == 1 and sum(counts) == 1


@st.composite
def cases(draw: st.DrawFn, short: bool = False) -> Case:
    """Requests that fit; with ``short`` those that may not."""
    ranks = draw(st.integers(1, 6))
    block_size = draw(st.integers(1, 5))
    new = draw(st.booleans())
    slots = st.just(0) if new else st.integers(0, block_size - 1)
    case = Case(
        tokens=0,
        open_slots=draw(st.lists(slots, min_size=ranks, max_size=ranks)),
        free_blocks=draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks)),
        block_size=block_size,
        last_rank=-1 if new else draw(st.integers(0, ranks - 1)),
        order=draw(st.permutations(range(ranks))),
    )
    case.tokens = draw(st.integers(0, sum(case.room) + (10 if short else 0)))
    return case


def simulate(policy: str, case: Case) -> tuple[int, ...]:
    """Place token by token, with nothing but the rule of the policy for the next one."""
    counts = [0] * len(case.room)
    unused = list(case.open_slots)  # slots in blocks held
    free = list(case.free_blocks)
    current = case.last_rank
    if current < 0:
        current = sorted(case.order, key=lambda r: -case.room[r])[0]
    home = case.order.index(current)
    ring = case.order[home:] + case.order[:home]
    fresh_start = case.last_rank < 0

    def has_room(rank: int) -> bool:
        return unused[rank] > 0 or free[rank] > 0

    for _ in range(case.tokens):
        if policy == "balanced":
            with_slots = [r for r in ring if unused[r]]
            rank = with_slots[0] if with_slots else sorted(ring, key=lambda r: -free[r])[0]
        elif policy == "fill_then_spill":
            rank = next(r for r in ring if has_room(r))
        elif unused[current] > 0 or (fresh_start and has_room(current)):
            rank = current
        else:
            i = case.order.index(current) + 1
            after = case.order[i:] + case.order[:i]
            rank = next(r for r in after if has_room(r))
        if unused[rank] == 0:
            free[rank] -= 1
            unused[rank] = case.block_size
        unused[rank] -= 1
        counts[rank] += 1
        current = rank
        fresh_start = False
    return tuple(counts)


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_every_policy_equals_its_rule_token_by_token(policy: str, case: Case) -> None:
    assert case.place(policy) == simulate(policy, case)


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases(short=True))
@settings(max_examples=300, deadline=None)
def test_sums_caps_and_none_only_when_short(policy: str, case: Case) -> None:
    counts = case.place(policy)
    if counts is None:
        assert case.tokens > sum(case.room)
        return
    assert case.tokens <= sum(case.room)
    assert sum(counts) == case.tokens
    assert all(0 <= n <= room for n, room in zip(counts, case.room, strict=True))


@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_balanced_is_as_level_as_whole_blocks_allow(case: Case) -> None:
    """No single block could be moved to another rank to bring the fullest and emptiest closer."""
    counts = case.place("balanced")
    assert counts is not None
    taken = [
        max(0, -(-(n - o) // case.block_size)) for n, o in zip(counts, case.open_slots, strict=True)
    ]
    left = [f - t for f, t in zip(case.free_blocks, taken, strict=True)]
    for giver, other in itertools.permutations(range(len(left)), 2):
        if taken[giver]:
            assert left[other] <= left[giver] + 1
    in_open = sum(min(n, o) for n, o in zip(counts, case.open_slots, strict=True))
    assert sum(taken) == 0 or in_open == sum(case.open_slots)


@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_fill_then_spill_keeps_a_new_request_whole_if_any_rank_can(case: Case) -> None:
    case.open_slots = [0] * len(case.room)
    case.last_rank = -1
    case.tokens = min(case.tokens, sum(case.room))
    counts = case.place("fill_then_spill")
    assert counts is not None
    touched = [r for r, n in enumerate(counts) if n]
    if 0 < case.tokens <= max(case.room):
        assert len(touched) == 1
        assert case.free_blocks[touched[0]] == max(case.free_blocks)
    # spilling: all ranks it touches but one are full
    assert sum(counts[r] < case.room[r] for r in touched) <= 1


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 5), st.data())
def test_fill_then_spill_touches_the_fewest_equal_ranks(
    ranks: int, blocks: int, block_size: int, data: st.DataObject
) -> None:
    each = blocks * block_size
    tokens = data.draw(st.integers(1, ranks * each))
    case = Case(tokens, [0] * ranks, [blocks] * ranks, block_size, -1, list(range(ranks)))
    counts = case.place("fill_then_spill")
    assert counts is not None
    assert sum(n > 0 for n in counts) == -(-tokens // each)


def test_by_hand() -> None:
    """Ring 0 2 1, newest token on rank 2, which has 3 open slots and one free block of 4."""
    case = Case(10, [0, 0, 3], [2, 2, 1], 4, 2, [0, 2, 1])
    assert case.place("fill_then_spill") == (0, 3, 7)
    assert case.place("round_robin") == (3, 4, 3)
    assert case.place("balanced") == (3, 4, 3)
    case.tokens = 3
    assert {case.place(policy) for policy in POLICIES} == {(0, 0, 3)}
    case.tokens = 23
    assert {case.place(policy) for policy in POLICIES} == {(8, 8, 7)}
    case.tokens = 24
    assert {case.place(policy) for policy in POLICIES} == {None}


def test_new_short_requests_go_where_most_is_free() -> None:
    for policy in POLICIES:
        free = [4, 4, 4]
        homes = []
        for _ in range(6):
            counts = Case(3, [0, 0, 0], list(free), 4, -1, [0, 2, 1]).place(policy)
            assert counts is not None
            home = counts.index(3)
            free[home] -= 1
            homes.append(home)
        assert homes == [0, 2, 1, 0, 2, 1]


def test_spilling_goes_to_the_nearest_next_in_the_ring() -> None:
    case = Case(5, [1, 0, 0, 0], [0, 9, 0, 9], 4, 0, [0, 2, 3, 1])
    assert case.place("fill_then_spill") == (1, 0, 0, 4)


@pytest.mark.parametrize("policy", ["fill_then_spill", "balanced"])
def test_cost_does_not_depend_on_how_much_is_free(policy: str) -> None:
    huge = 10**15
    for tokens in (1, huge):
        case = Case(tokens, [0] * 4, [huge, huge + 1, huge, huge], 64, -1, [0, 1, 2, 3])
        counts = case.place(policy)
        assert counts is not None and sum(counts) == tokens


def test_one_decode_token_by_round_robin_does_not_walk_the_blocks() -> None:
    counts = Case(1, [0] * 4, [10**15] * 4, 64, 3, [0, 1, 2, 3]).place("round_robin")
    assert counts == (1, 0, 0, 0)


def grow(
    allocator: BlockAllocator, table: SequenceTable, policy: str, layout: str, tokens: int
) -> bool:
    """What a scheduler does for a request's next tokens: whole blocks are placed and laid out.
    False when they do not fit."""
    ranks = range(len(allocator.blocks_per_rank))
    counts = place(
        policy,
        table.blocks_for(tokens),
        open_slots=[0] * len(ranks),
        free_blocks=allocator.available(),
        block_size=1,
        last_rank=table.last_rank,
        order=list(ranks),
    )
    if counts is None:
        return False
    homes: dict[int, tuple[int, int]] = {}
    for rank, runs in enumerate(assign(layout, 0, counts, 1)):
        held = [block for home, block in table.homes if home == rank]
        blocks = allocator.allocate(rank, counts[rank], extend_from=held[-1] if held else None)
        homes |= {i: (rank, b) for i, b in zip(positions(runs), blocks, strict=True)}
    table.append([homes[i] for i in range(len(homes))], tokens)
    return True


def stored(table: SequenceTable, ranks: int) -> list[int]:
    """Tokens on each rank."""
    return [table.blocks_on(rank).num_keys for rank in range(ranks)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budgets", [[3], [3, 3, 3, 3], [2, 6], [0, 5, 1], [1, 0, 0, 7, 2]])
def test_a_prompt_of_exactly_the_whole_capacity_is_held(
    policy: str, layout: str, budgets: list[int]
) -> None:
    allocator = BlockAllocator(budgets, block_size=8)
    table = SequenceTable(8)
    capacity = sum(budgets) * 8
    assert capacity == allocator.capacity_tokens
    assert grow(allocator, table, policy, layout, capacity)
    assert allocator.available() == [0] * len(budgets)
    assert stored(table, len(budgets)) == [n * 8 for n in budgets]
    assert not grow(allocator, table, policy, layout, 1)
    allocator.release(table.homes)
    assert allocator.available() == budgets


@pytest.mark.parametrize("policy", POLICIES)
def test_budgets_of_one_and_three_serve_four(policy: str) -> None:
    one = 5
    allocator = BlockAllocator([one, 3 * one], block_size=16)
    table = SequenceTable(16)
    assert not grow(allocator, table, policy, "zigzag", 4 * one * 16 + 1)
    assert grow(allocator, table, policy, "zigzag", 4 * one * 16)
    assert stored(table, 2) == [one * 16, 3 * one * 16]


@pytest.mark.parametrize("policy", POLICIES)
@given(
    budgets=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    block_size=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_a_request_alone_grows_to_the_sum_of_all_ranks(
    policy: str, budgets: list[int], block_size: int, layout: str, data: st.DataObject
) -> None:
    """In steps of any size, never refused before every slot of every rank is used."""
    allocator = BlockAllocator(budgets, block_size)
    table = SequenceTable(block_size)
    capacity = allocator.capacity_tokens
    while table.num_tokens < capacity:
        step = data.draw(st.integers(1, capacity - table.num_tokens))
        assert grow(allocator, table, policy, layout, step)
        allocator.check_integrity()
    assert not grow(allocator, table, policy, layout, 1)
    parts = [table.blocks_on(rank) for rank in range(len(budgets))]
    assert sorted(p for part in parts for p in positions(part.runs())) == list(range(capacity))
    for budget, part in zip(budgets, parts, strict=True):
        assert sorted(positions(part.extents(block_size))) == list(range(budget * block_size)), (
            "each slot once"
        )
    allocator.release(table.homes)
    allocator.check_integrity({})
    assert allocator.available() == budgets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "anywhere"}, "'anywhere'; known: fill_then_spill, round_robin, balanced"),
        ({"order": [0, 0]}, "name the same ranks"),
        ({"open_slots": [0]}, "1 open_slots, 2 free_blocks"),
        ({"tokens": -1}, "tokens=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"last_rank": 2}, "last_rank=2 of 2 ranks"),
        ({"free_blocks": [3, -1]}, "negative"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "policy": "balanced",
        "tokens": 3,
        "open_slots": [0, 0],
        "free_blocks": [4, 4],
        "block_size": 2,
        "last_rank": -1,
        "order": [0, 1],
    }
    with pytest.raises(ValueError, match=message):
        place(**(arguments | change))  # type: ignore[arg-type]
