"""What an engine says of itself, and whether it takes requests, in each state."""

from __future__ import annotations

import pytest

from ds_cp.errors import EngineDeadError, StoppingError
from ds_cp.serve.standing import Standing

STALL_S = 60.0


@pytest.mark.parametrize(
    ("flags", "mends", "age_s", "state", "takes"),
    [
        ("", False, 0.0, "starting", False),
        ("is_loaded", False, 0.0, "ready", True),
        ("is_loaded", False, 61.0, "stalled", True),
        ("is_loaded", True, 0.0, "recovering", True),
        ("is_loaded is_interrupted", False, 99.0, "recovering", True),
        ("is_loaded is_refusing", True, 0.0, "stopping", False),
        ("is_loaded is_refusing is_cut is_dead", False, 0.0, "stopping", False),
        ("is_loaded is_dead", True, 0.0, "dead", False),
        ("is_loaded is_dead is_refusing has_failed", False, 0.0, "dead", False),
    ],
)  # fmt: skip
def test_each_state(flags: str, mends: bool, age_s: float, state: str, takes: bool) -> None:
    standing = Standing(lambda: mends, STALL_S)
    for flag in flags.split():
        setattr(standing, flag, True)
    assert standing.state(age_s) == state
    if takes:
        standing.check()
    else:
        with pytest.raises(StoppingError if state == "stopping" else EngineDeadError):
            standing.check()
