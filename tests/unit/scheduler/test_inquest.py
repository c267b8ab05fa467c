"""Who ends workers, from who was in flight when they ended."""

from __future__ import annotations

from ds_cp.scheduler.inquest import Inquest
from ds_cp.scheduler.recovery import Flight

ALIVE = range(100)


def flights(*steps: tuple[int, ...]) -> list[Flight]:
    return [Flight(requests=requests) for requests in steps]


def test_one_among_many() -> None:
    inquest = Inquest()
    assert inquest.interrupted(flights((1, 2), (1, 3)), ALIVE) is None
    assert not inquest.suspects
    assert inquest.interrupted(flights((1, 2, 4)), ALIVE) is None
    assert inquest.suspects == {1, 2}
    [flight] = flights((1,))
    inquest.done(flight)
    assert inquest.suspects == {2}
    assert inquest.interrupted(flights((2,)), ALIVE) == 2
    assert not inquest.suspects


def test_others_may_come_on_between() -> None:
    """It is a step of its own that frees a request."""
    inquest = Inquest()
    for _ in range(2):
        assert inquest.interrupted(flights((1, 2)), ALIVE) is None
        inquest.done(flights((1,))[0])
    assert inquest.suspects == {2}
    assert inquest.interrupted(flights((2,)), ALIVE) == 2


def test_a_step_of_its_own_frees_it() -> None:
    inquest = Inquest()
    for _ in range(9):
        assert inquest.interrupted(flights((1,)), ALIVE) is None
        inquest.done(flights((1,))[0])
        assert not inquest.suspects


def test_nobody_in_flight_is_nobodys_fault() -> None:
    inquest = Inquest()
    for _ in range(9):
        assert inquest.interrupted(flights(), ALIVE) is None
    assert not inquest.suspects


def test_who_is_alone_twice_is_found_at_the_second_time() -> None:
    inquest = Inquest()
    assert inquest.interrupted(flights((1,), (1,)), ALIVE) is None
    inquest.done(flights((2,))[0])
    assert inquest.interrupted(flights((1,)), ALIVE) == 1


def test_one_time_in_company_and_one_alone_prove_nothing() -> None:
    inquest = Inquest()
    assert inquest.interrupted(flights((1, 2)), ALIVE) is None
    assert inquest.interrupted(flights((1,)), ALIVE) is None
    assert inquest.suspects == {1}
    assert inquest.interrupted(flights((1,)), ALIVE) == 1


def test_who_has_ended_is_forgotten() -> None:
    inquest = Inquest()
    for _ in range(2):
        inquest.interrupted(flights((1, 2)), ALIVE)
    assert inquest.interrupted(flights((1,)), {2}) is None
    assert inquest.suspects == {2}
