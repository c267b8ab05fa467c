"""Memory of freed blocks goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Frees every other one of 40 blocks of 4 MB, after glibc has seen blocks of that size freed; prints
# how many MB of them are still in memory.
_FREES = """
import sys
from ds_cp.process import give_large_blocks_back

def resident():
    status = open("/proc/self/status").read()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024

if sys.argv[1] == "yes":
    give_large_blocks_back()
before = resident()
for _ in range(2):
    blocks = [b"x" * (4 << 20) for _ in range(40)]
    del blocks[::2]
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_leave_although_others_stay() -> None:
    left = [
        int(subprocess.check_output([sys.executable, "-c", _FREES, call], timeout=60))
        for call in ("no", "yes")
    ]
    assert 75 <= left[1] <= 100, left
    assert left[1] <= left[0]
