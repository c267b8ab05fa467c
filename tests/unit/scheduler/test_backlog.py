"""Sums over the queue, against a plain list."""

from __future__ import annotations

import random

import pytest

from ds_cp.scheduler.backlog import MOST, Backlog, Load


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_a_list(seed: int) -> None:
    rng, backlog = random.Random(seed), Backlog()
    plain: dict[tuple[float, float, float], Load] = {}
    for number in range(4 * MOST):
        if plain and rng.random() < 0.4:
            order = rng.choice(list(plain))
            del plain[order]
            backlog.remove(order)
        else:
            order = (rng.randrange(3), rng.randrange(50), number)
            plain[order] = Load(rng.randrange(5), rng.randrange(9999), rng.randrange(99))
            backlog.add(order, plain[order])
        if number % 50 == 0:
            place = (rng.randrange(3), rng.randrange(50), float("inf"))
            before = [load for order, load in plain.items() if order < place]
            assert backlog.before(place) == tuple(map(sum, zip(*before, strict=True))) or not before
    for order in list(plain):
        backlog.remove(order)
    assert backlog.before((9, 9, 9)) == Load()


def test_what_is_not_there_cannot_be_removed() -> None:
    backlog = Backlog()
    with pytest.raises(KeyError):
        backlog.remove((0, 0, 0))
    backlog.add((0, 0, 1), Load(1, 2, 3))
    for order in ((0, 0, 0), (0, 0, 2)):
        with pytest.raises(KeyError):
            backlog.remove(order)
