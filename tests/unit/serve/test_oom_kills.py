"""The kernel's count of processes that it ended for memory, in files as it writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_cp.serve.oom_kills import OomKills


@pytest.mark.parametrize(
    ("line", "file", "text"),
    [
        ("0::/a/b", "a/b/memory.events", "low 0\nhigh 3\nmax 9\noom 1\noom_kill {}\n"),
        ("0::/elsewhere", "memory.events", "oom_kill {}\n"),
        ("0::/host/pod/a", "a/memory.events", "oom_kill {}\n"),
        ("4:cpu,memory:/j", "memory/j/memory.oom_control", "under_oom 0\noom_kill {}\n"),
    ],
)
def test_a_new_one_is_seen_once(line: str, file: str, text: str, tmp_path: Path) -> None:
    groups, counts = tmp_path / "cgroup", tmp_path / file
    groups.write_text(f"9:name=systemd:/\n{line}\n")
    counts.parent.mkdir(parents=True, exist_ok=True)
    counts.write_text(text.format(2))
    kills = OomKills(groups, tmp_path)
    assert not kills.is_new()
    counts.write_text(text.format(3))
    assert kills.is_new() and not kills.is_new()
    counts.unlink()
    assert not kills.is_new()


def test_where_the_kernel_says_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert not OomKills(tmp_path / "none", tmp_path).is_new()
    (tmp_path / "odd").write_text("what\n")
    assert not OomKills(tmp_path / "odd", tmp_path).is_new()


GROUP = Path("/sys/fs/cgroup/memory") / f"ds_cp_test_{os.getpid()}"
GREEDY = """
import os, pathlib, subprocess, sys
pathlib.Path(sys.argv[1], "tasks").write_text(str(os.getpid()))
from ds_cp.serve.oom_kills import OomKills
from ds_cp.serve.worker_child import describe_end
kills = OomKills()
child = subprocess.run([sys.executable, "-c", "x = bytearray(1 << 30)"])
print(describe_end(child.returncode, kills.is_new()))
"""


def test_a_real_one() -> None:
    try:
        GROUP.mkdir()
    except OSError as err:
        pytest.skip(f"no control group can be made here: {err}")
    try:
        (GROUP / "memory.limit_in_bytes").write_text(str(200 << 20))
        done = subprocess.run(
            [sys.executable, "-c", GREEDY, str(GROUP)], capture_output=True, text=True, timeout=120
        )
    finally:
        GROUP.rmdir()
    said = "SIGKILL, by the kernel, as the memory of its control group was full"
    assert done.stdout.strip() == said, done.stderr
