"""The measure itself: honest streams beside no attack at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.front import front, honest_streams

pytestmark = pytest.mark.quiet


def test_without_an_attack_streams_are_even(tmp_path: Path) -> None:
    with front(tmp_path, engine={"delay_s": 0.02}) as attacked:
        with honest_streams(attacked.url, 5) as met:
            before = attacked.memory
        assert before > 10 << 20
    assert met.whole >= 5 and not met.lost, met.why
    assert 0.02 <= met.gap_s <= 1.0
