"""The books of host memory against a plain model: a list of keys in order of use."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ds_cp.kv.host_tier import HostTier
from ds_cp.layout import Home, host_place, host_slot, on_host


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_a_place_is_no_block_and_names_its_slot() -> None:
    for slot in (0, 1, 77):
        place = host_place(3, slot)
        assert place[0] == 3 and on_host(place) and host_slot(place[1]) == slot
    assert not on_host((0, 0)) and not on_host((2, 5))


def test_content_is_due_until_its_block_is_written() -> None:
    tier = HostTier([2])
    assert tier.keep(key(1), (0, 7))
    place = tier.find(key(1))
    assert place is not None and on_host(place)
    assert tier.source(place) == (0, 7) and tier.spilled == 0
    assert tier.spill((0, 7)) == place and tier.source(place) == place
    assert tier.spill((0, 7)) is None and tier.spilled == 1


def test_the_least_recently_used_is_given_away() -> None:
    tier = HostTier([2])
    for n in (1, 2):
        tier.keep(key(n), (0, n))
    place = tier.find(key(1))
    assert place is not None
    tier.lease(place)
    tier.give_back(place)
    tier.keep(key(3), (0, 3))
    assert tier.find(key(2)) is None and tier.find(key(1)) == place and tier.lost == 1
    assert tier.spill((0, 2)) is None, "it is due no more"


def test_a_leased_slot_stays_without_its_key_until_it_is_given_back() -> None:
    tier = HostTier([1])
    tier.keep(key(1), (0, 1))
    place = tier.find(key(1))
    assert place is not None
    tier.lease(place)
    assert not tier.keep(key(2), (0, 2)), "no slot"
    tier.drop(key(1))
    assert tier.find(key(1)) is None and tier.num_used(0) == 1 and tier.num_leased(0) == 1
    assert tier.source(place) == (0, 1) and not tier.keep(key(2), (0, 2))
    tier.give_back(place)
    assert tier.num_used(0) == 0 and tier.keep(key(2), (0, 2))


def test_what_later_plans_kept_or_copied_is_forgotten_with_them() -> None:
    tier = HostTier([4])
    for step in (1, 2, 3):
        tier.step = step
        tier.keep(key(step), (0, step))
    tier.step = 4
    tier.spill((0, 1))
    assert tier.rewind(2) == 2, "the one that step 3 kept, and the one that step 4 copied"
    assert [tier.find(key(n)) is None for n in (1, 2, 3)] == [True, False, True]
    tier.check_integrity({}, lambda _: None)
    assert tier.rewind(2) == 0 and tier.rewind(0) == 1 and tier.num_used(0) == 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="slots_per_rank"):
        HostTier([1, -1])
    tier = HostTier([1])
    with pytest.raises(ValueError, match="slot 0 of rank 0 is not kept"):
        tier.lease(host_place(0, 0))


def test_random_books() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        slots = [draw.randint(0, 5) for _ in range(draw.randint(1, 3))]
        tier = HostTier(slots)
        kept: list[list[bytes]] = [[] for _ in slots]  # least recently used first
        content: dict[Home, bytes] = {}  # of blocks and of slots, as copies make it
        where: dict[bytes, Home] = {}
        leases: Counter[Home] = Counter()
        numbers = iter(range(10_000))
        for _ in range(200):
            rank = draw.randrange(len(slots))
            what = draw.choice(["keep", "keep", "keep", "write", "lease", "back", "drop", "empty"])
            if what == "keep":
                block = rank, draw.randrange(100)
                if (at := tier.spill(block)) is not None:  # it was written to hold this
                    content[at] = content[block]
                name = key(next(numbers))
                free = slots[rank] - tier.num_used(rank)
                content[block] = name
                given = next((k for k in kept[rank] if not leases[where[k]]), None)
                assert tier.keep(name, block) == bool(free or given)
                if not free and given is not None:
                    kept[rank].remove(given)
                    del where[given]
                place = tier.find(name)
                if place is not None:
                    kept[rank].append(name)
                    where[name] = place
            elif what == "write":
                block = rank, draw.randrange(100)
                if (at := tier.spill(block)) is not None:
                    content[at] = content[block]
                content[block] = b""
            elif what == "lease" and kept[rank]:
                name = draw.choice(kept[rank])
                tier.lease(where[name])
                leases[where[name]] += 1
                kept[rank].remove(name)
                kept[rank].append(name)
            elif what == "back" and +leases:
                place = draw.choice(sorted((+leases).elements()))
                tier.give_back(place)
                leases[place] -= 1
            elif what == "drop" and kept[rank]:
                name = draw.choice(kept[rank])
                tier.drop(name)
                kept[rank].remove(name)
                del where[name]
            elif what == "empty" and draw.random() < 0.2:
                assert tier.empty_rank(rank) == len(kept[rank])
                for name in kept[rank]:
                    del where[name]
                kept[rank] = []
            for name, place in where.items():
                assert tier.find(name) == place and content[tier.source(place)] == name
            tier.check_integrity(dict(+leases), lambda _: None)
        assert tier.clear() == sum(map(len, kept))
        assert [tier.num_used(r) for r in range(len(slots))] == [
            sum(leases[p] > 0 for p in leases if p[0] == r) for r in range(len(slots))
        ]
