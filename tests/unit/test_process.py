"""Imports without collections."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from ds_cp.process import importing


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The collector as it was."""
    before = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if before else gc.disable)()


def test_the_collector_rests_while_imports_run_and_works_again_afterwards() -> None:
    gc.enable()
    with importing():
        assert not gc.isenabled()
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the outer one is not over
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()


def test_what_is_imported_for_good_is_not_walked_again() -> None:
    gc.enable()
    frozen = gc.get_freeze_count()
    with importing():
        kept = [[] for _ in range(1000)]
    assert gc.get_freeze_count() == frozen
    with importing(for_good=True):
        kept += [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= frozen + len(kept)
    assert gc.isenabled()
