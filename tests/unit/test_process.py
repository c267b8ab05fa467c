"""A process that is up has a heap that the collector leaves alone, and so has one that imports."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from ds_cp.process import importing, settle_heap

# A full collection walks what is alive unless it is settled: 400,000 lists take some 20 ms.
COLLECTIONS = """
import gc, time
from ds_cp.process import settle_heap

stays = [[i] for i in range(400_000)]

def collect():
    begun = time.thread_time()
    gc.collect()
    return time.thread_time() - begun

before = min(collect() for _ in range(3))
settle_heap()
after = min(collect() for _ in range(3))
print(before / after)
"""


def test_a_full_collection_passes_by_what_is_settled() -> None:
    run = [sys.executable, "-c", COLLECTIONS]
    ratio = float(
        subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    )
    assert ratio > 5


def lost_cycle() -> Any:
    """A weak reference to a cycle that nothing else refers to."""

    class Ring:
        pass

    ring = Ring()
    ring.itself = ring  # type: ignore[attr-defined]
    return weakref.ref(ring)


@pytest.mark.usefixtures("settled_heap")
def test_what_comes_later_is_collected() -> None:
    seen = lost_cycle()
    gc.collect()
    assert seen() is None


def test_cycles_from_before_are_collected_first() -> None:
    seen = lost_cycle()
    settle_heap()
    assert seen() is None


@pytest.fixture
def collector() -> Iterator[None]:
    """The collector at work, and as it was afterwards."""
    before = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if before else gc.disable)()


@pytest.mark.usefixtures("collector")
def test_it_rests_while_imports_run_and_works_again_afterwards() -> None:
    with importing():
        assert not gc.isenabled()
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the outer one is not over
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.usefixtures("collector")
def test_who_has_switched_it_off_finds_it_off() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()


@pytest.mark.usefixtures("collector")
def test_what_is_imported_for_good_is_not_walked_again() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        kept = [[number] for number in range(1000)]
    assert gc.get_freeze_count() == frozen
    with importing(for_good=True):
        kept += [[number] for number in range(1000)]
    assert gc.get_freeze_count() >= frozen + len(kept)
