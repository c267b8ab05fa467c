"""A few faults of the long harness (``make faults``), on one server under load."""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

from benchmarks.faults.kinds import KINDS
from benchmarks.faults.life import Life
from benchmarks.faults.load import Tally
from benchmarks.faults.server import INJECTED, configure
from tests.helpers.jobs import ROOT, Job, command

FAULTS = (
    "an exception in a kernel", "no memory for a worker", "garbage on every port",
    "half a message, then the end", "a supervisor stands still for 1 s",
    "the clock jumps by an hour", "clients leave",
)  # fmt: skip


def test_no_answer_is_lost_or_wrong_and_nothing_is_left(tmp_path: Path) -> None:
    file = configure(tmp_path, None, argparse.Namespace(tokens=1024, hang_s=30.0))
    argv = command("ds-cp", "serve", 2, ["--config", str(file)])
    env = {"PYTHONPATH": os.pathsep.join([str(INJECTED), str(ROOT)])}
    tally, expected = Tally(), list[Any]()
    rng = random.Random()
    with Life(lambda: Job(argv, tmp_path, env), 2, 3, None, expected, tally, rng) as life:
        life.begin()
        for name in FAULTS:
            outcome = life.suffer(KINDS[name], "decode")
            assert not outcome.fault, outcome
        assert life.end() == ""
    assert tally.right > len(FAULTS) and not tally.wrong, tally
