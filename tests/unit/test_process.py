"""A process that is up has a heap that the collector leaves alone."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from ds_cp.process import settle_heap

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


@pytest.mark.usefixtures("settled_heap")
def test_what_comes_later_is_collected() -> None:
    class Ring:
        pass

    ring = Ring()
    ring.itself = ring  # type: ignore[attr-defined]
    seen = weakref.ref(ring)
    del ring
    gc.collect()
    assert seen() is None


def test_cycles_from_before_are_collected_first() -> None:
    class Ring:
        pass

    ring = Ring()
    ring.itself = ring  # type: ignore[attr-defined]
    seen = weakref.ref(ring)
    del ring
    try:
        settle_heap()
        assert seen() is None
    finally:
        gc.unfreeze()
