"""All attacks at once beside honest streams: nobody waits, nothing is lost, memory comes back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.attacks import FILES, GAP_S, MB, MEMORY_MB, SETTINGS, warm
from tests.helpers.attackers import KINDS, attackers
from tests.helpers.front import Honest, front, honest_streams, load
from tests.helpers.probe import Probe

pytestmark = pytest.mark.quiet

ATTACK_S, AGAIN_S = 5.0, 20.0  # the second time where others have the cores
BACK_S = 10.0  # seconds after which the memory is back
# By attacker, one of what it must have done, and the statuses that it may have seen: "closed" is an
# end without any. The first two kinds read no answer.
BUSY = {"503", "closed"}
DONE: dict[str, tuple[set[str], set[str]]] = {
    "non_readers": ({"opened"}, set()),
    "tiny_chunks": ({"sent"}, set()),
    "bad_bodies": ({"400"}, {"400"} | BUSY),
    "templates": ({"400"}, {"200", "400"} | BUSY),
    "big_answers": ({"200", "503"}, {"200"} | BUSY),
    "idle": ({"closed"}, {"200", "408"} | BUSY),
}
OTHER_COUNTS = {"opened", "sent", "tasks", "cpu_s"}


@dataclass
class Attack:
    """What all attackers did and honest streams met."""

    met: Honest
    did: dict[str, dict[str, float]]

    @property
    def idle(self) -> list[str]:
        """The attackers that did not get to attack."""
        return [kind for kind, (must, _) in DONE.items() if not any(map(self.did[kind].get, must))]


def attack(folder: Path, seconds: float) -> Attack:
    folder.mkdir()
    with front(folder, files=FILES, **SETTINGS) as attacked:
        warm(attacked.url)
        process = psutil.Process(attacked.process.pid)
        with Probe(attacked.url, process) as probe, honest_streams(attacked.url, 20) as met:
            before = attacked.memory
            with attackers(attacked.url, KINDS) as did:
                time.sleep(seconds)
        assert not probe.killed, f"it took {probe.most / MB:.0f} MB"
        end = time.monotonic() + BACK_S
        while (grown := (attacked.memory - before) / MB) > MEMORY_MB and time.monotonic() < end:
            time.sleep(0.1)
    assert grown <= MEMORY_MB, f"{grown:.0f} MB more than before"
    assert met.whole >= 20 and not met.lost, met
    assert set(did) == set(DONE) == set(KINDS)
    for kind, (_, may) in DONE.items():
        assert set(did[kind]) - OTHER_COUNTS <= may, (kind, did)
    return Attack(met, did)


def test_all_attacks_at_once(tmp_path: Path) -> None:
    busy, bound = load(20), GAP_S
    made = attack(tmp_path / "first", ATTACK_S)
    if busy > 1 and (made.met.gap_s > GAP_S or made.idle):
        bound = GAP_S * max(1.0, load(20))  # now others may have their share
        made = attack(tmp_path / "second", AGAIN_S)
    assert made.met.gap_s <= bound, (made.met, busy)
    assert not made.idle, (made, busy)
