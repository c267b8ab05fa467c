"""Who makes room when every place is taken, and the limit of open files."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys

import pytest

from ds_cp.api.transport.capacity import (
    AUTO_CONNECTIONS,
    EXTRA_CONNECTIONS,
    RESERVED_FILES,
    Capacity,
    Seldom,
)


class Fake:
    def __init__(self) -> None:
        self.closed = False

    def give_way(self) -> None:
        self.closed = True


def opened(capacity: Capacity, count: int, idle: bool) -> list[Fake]:
    made = [Fake() for _ in range(count)]
    for one in made:
        capacity.add(one)
        capacity.set_idle(one, idle)
    return made


def test_the_longest_idle_makes_room() -> None:
    capacity = Capacity(3)
    a, b, c = opened(capacity, 3, idle=True)
    capacity.set_idle(a, False)
    capacity.set_idle(a, True)  # b has been idle longest now
    capacity.set_idle(b, True)  # said again, which changes nothing
    (d,) = opened(capacity, 1, idle=False)
    assert (a.closed, b.closed, c.closed) == (False, True, False)
    capacity.discard(b)  # its end, which the transport reports later
    opened(capacity, 1, idle=False)
    assert c.closed and not a.closed and not d.closed
    assert not any(capacity.is_beyond(one) for one in (a, d))


def test_beyond_the_bound() -> None:
    capacity = Capacity(2)
    inside = opened(capacity, 2, idle=False)
    beyond = opened(capacity, EXTRA_CONNECTIONS, idle=False)
    assert all(capacity.is_beyond(one) for one in beyond)
    assert not any(capacity.is_beyond(one) for one in inside)
    assert not capacity.has_room()
    capacity.set_idle(beyond[3], True)
    assert capacity.has_room()
    opened(capacity, 1, idle=False)
    assert beyond[3].closed and not capacity.has_room()
    for one in [*inside, *beyond[4:]]:
        capacity.discard(one)
    assert capacity.has_room()
    for one in beyond[:2]:
        capacity.discard(one)
    assert not capacity.is_beyond(beyond[2])  # room came


@pytest.mark.parametrize(
    ("soft", "hard", "setting", "bound", "after"),
    [
        (
            256,
            4096,
            "auto",
            AUTO_CONNECTIONS,
            AUTO_CONNECTIONS + EXTRA_CONNECTIONS + RESERVED_FILES,
        ),
        (2048, 4096, "auto", AUTO_CONNECTIONS, 2048),
        (256, 256, "auto", 256 - EXTRA_CONNECTIONS - RESERVED_FILES, 256),
        (256, 512, 2000, 512 - EXTRA_CONNECTIONS - RESERVED_FILES, 512),
        (256, 4096, 2000, 2000, 2000 + EXTRA_CONNECTIONS + RESERVED_FILES),
        (64, 64, "auto", 1, 64),
    ],
)
def test_the_bound_is_below_the_limit_of_files(
    soft: int, hard: int, setting: object, bound: int, after: int
) -> None:
    """In a process of its own, since a hard limit cannot be raised again."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < hard:
        pytest.skip(
            f"the case needs {hard} open files, the hard limit is {most}; raise it: ulimit -Hn"
        )
    code = (
        "import resource\n"
        "from ds_cp.api.transport.capacity import connection_bound\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"print(connection_bound({setting!r}), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(bound), str(after), str(hard)]
    warned = setting != "auto" and bound < int(str(setting))
    assert (f"server.max_connections is {setting}" in done.stderr) == warned


def test_seldom(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ds_cp.api"):
        hourly = Seldom(3600.0)
        for _ in range(5):
            hourly.warning("again")
        always = Seldom(0.0)
        always.warning("one")
        always.warning("two")
    assert caplog.messages == ["again", "one", "two"]


def test_who_has_sent_nothing_yet_is_not_closed() -> None:
    """Its request may be in the kernel. One that is whole beyond the bound goes first."""
    capacity = Capacity(2)
    silent = [Fake() for _ in range(2)]
    later = [Fake() for _ in range(EXTRA_CONNECTIONS)]
    for one in [*silent, *later]:
        capacity.add(one)
    assert not capacity.has_room() and not capacity.close_idle()
    assert capacity.take_place(silent[0]) and capacity.take_place(later[0])  # from silent[0]
    assert capacity.is_beyond(silent[0]) and not capacity.is_beyond(later[0])
    for one in (later[0], silent[1]):
        capacity.set_idle(one, False)
    assert not capacity.take_place(later[1]) and not capacity.take_place(silent[0])
    capacity.set_idle(silent[1], True)
    assert capacity.take_place(later[1]) and not silent[1].closed
    assert capacity.has_room() and capacity.close_idle() and silent[1].closed
    assert not any(one.closed for one in [silent[0], *later])


def test_the_bound_holds_when_one_beyond_it_makes_room() -> None:
    capacity = Capacity(2)
    opened(capacity, 2, idle=False)
    (beyond,) = opened(capacity, 1, idle=True)
    (later,) = opened(capacity, 1, idle=False)
    assert beyond.closed and capacity.is_beyond(later)
