"""All attacks at once beside honest streams: nobody waits, nothing is lost, memory comes back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from benchmarks.attacks import FILES, MB, MEMORY_MB, SETTINGS, warm
from tests.helpers.attackers import KINDS, attackers
from tests.helpers.front import front, honest_streams
from tests.helpers.probe import Probe

ATTACK_S = 5.0
# Seconds of the longest gap, on a machine that does nothing else.
GAP_S = 1.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_all_attacks_at_once(tmp_path: Path) -> None:
    with front(tmp_path, files=FILES, **SETTINGS) as attacked:
        warm(attacked.url)
        process = psutil.Process(attacked.process.pid)
        with Probe(attacked.url, process) as probe, honest_streams(attacked.url, 20) as met:
            before = attacked.memory
            with attackers(attacked.url, KINDS) as did:
                time.sleep(ATTACK_S)
        assert not probe.killed, f"it took {probe.most / MB:.0f} MB"
        assert met.whole >= 20 and not met.lost, met
        assert met.gap_s <= GAP_S, met
        assert set(did) == set(KINDS) and all(kind["opened"] for kind in did.values()), did
        end = time.monotonic() + 10
        while (grown := (probe.memory - before) / MB) > MEMORY_MB and time.monotonic() < end:
            time.sleep(0.1)
        assert grown <= MEMORY_MB, f"{grown:.0f} MB more than before"
