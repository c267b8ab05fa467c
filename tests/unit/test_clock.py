"""The clock that does not jump."""

from __future__ import annotations

import time

import pytest

from ds_cp.clock import steady_time


def test_it_is_the_time_and_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(steady_time() - time.time()) < 60
    before = steady_time()
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + 3600)
    assert 0 <= steady_time() - before < 60
