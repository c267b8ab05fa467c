"""The driver of the GPU benchmark: a section that fails or hangs loses nothing but itself."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import gpu, gpu_checks

SCRIPTS = {
    "kernels": 'print(\'ROW {"what": "a", "ok": true}\'); print(\'said\')',
    "one-rank": 'print(\'ROW {"what": "b", "ok": false, "against": "c"}\')',
    "prefill": 'print(\'ROW {"what": "d", "value": "7 ms"}\', flush=True); 1 / 0',
    "decode": 'print(\'ROW {"what": "e", "value": "1"}\', flush=True)\nwhile True: pass',
    "merge": 'print(\'ROW {"what": "f", "value": "2", "target": "> 1"}\')',
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "argv_of", lambda name, *_: [sys.executable, "-c", SCRIPTS[name]])
    limits = {name: (2.0 if name == "decode" else 30.0, 1, "") for name in gpu.SECTIONS}
    monkeypatch.setattr(gpu, "SECTIONS", limits)
    monkeypatch.setattr(gpu, "device_name", lambda device: "NVIDIA Some-GPU 80GB")


def test_every_section_is_reported(
    scripted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "kernels,one-rank,prefill,decode,merge"
    assert gpu.main(["--only", names, "--out", str(tmp_path)]) == 1
    [file] = tmp_path.iterdir()
    assert file.name.startswith("gpu-20") and file.name.endswith("-nvidia-some-gpu-80gb.json")
    found = json.loads(file.read_text())
    assert found["wrong"] == ["one-rank"] and list(found["sections"]) == names.split(",")
    assert "ZeroDivisionError" in "\n".join(found["sections"]["prefill"]["output"])
    table = capsys.readouterr().out.rpartition("| section |")[2].splitlines()
    assert table[2:] == [
        "| kernels | a | ok |  |  |",
        "| one-rank | b | WRONG | c |  |",
        "| prefill | d | 7 ms |  |  |",
        "| prefill | (failed) | exit status 1 | | |",
        "| decode | e | 1 |  |  |",
        "| decode | (failed) | not done after 2 s | | |",
        "| merge | f | 2 |  | > 1 |",
    ]


def test_no_time_left_is_said(scripted: None, tmp_path: Path) -> None:
    assert gpu.main(["--only", "kernels", "--out", str(tmp_path), "--limit", "1"]) == 1
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_text())["sections"]["kernels"]["problem"] == "no time was left"


def test_commands_and_names() -> None:
    assert sum(seconds for seconds, _, _ in gpu.SECTIONS.values()) <= gpu.LIMIT_S
    assert gpu.LIMIT_S < 9 * 60
    for name, (_, ranks, module) in gpu.SECTIONS.items():
        argv = gpu.argv_of(name, "cuda", False)
        if module:
            assert callable(importlib.import_module(f"benchmarks.{module}").section)
            assert f"benchmarks.{module}" in argv and name in argv
            told = gpu._environments(ranks)
            assert [env.get("RANK", "0") for env in told] == [str(rank) for rank in range(ranks)]
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])


def test_the_ranks_tests_are_there() -> None:
    """A run on a GPU must not find out that one has another name."""
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", *gpu.RANK_TESTS]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    argv = gpu.argv_of("rank-tests", "cuda", False)
    assert argv[:2] == ["env", "DS_CP_TEST_DEVICE=cuda"] and argv[-3:] == list(gpu.RANK_TESTS)


def run(monkeypatch: pytest.MonkeyPatch, name: str, script: str, device: str, limit: float) -> Any:
    monkeypatch.setattr(gpu, "argv_of", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(gpu, "STOP_S", 1.0)
    return gpu.run_section(name, device, True, limit)


HOLDS = """
import os, subprocess, sys, time
if os.environ["RANK"] == "1":
    held = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                            start_new_session=True)
    print(f"HELD {held.pid}", flush=True)
    time.sleep(600)
print('ROW {"what": "a", "ok": true}', flush=True)
print('ROW {"what": "b", "o', flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_that_hang_and_what_they_started_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a session of its own, with the output held open; a cut row loses no other."""
    began = time.monotonic()
    found = run(monkeypatch, "two-ranks", HOLDS, "cuda", 4.0)
    assert time.monotonic() - began < 60
    assert found["problem"] == "not done after 4 s"
    assert found["rows"] == [{"what": "a", "ok": True}]
    [pid] = [int(line[5:]) for line in found["output"] if line.startswith("HELD ")]
    until = time.monotonic() + 60
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(pid)
    assert "o" in found["output"][-1]


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, time; time.sleep(600) if os.environ['RANK'] != '1' else exit(3)"
    assert run(monkeypatch, "two-ranks", script, "cuda", 120)["problem"] == "exit status 3"


@pytest.mark.parametrize(
    ("says", "status", "device", "right"),
    [
        ("3 passed, 2 skipped in 1 s", 0, "cuda", True),
        ("5 skipped in 1 s", 0, "cuda", False),
        ("9 deselected in 1 s", 5, "cuda", False),
        ("9 deselected in 1 s", 5, "cpu", True),
        ("1 failed, 3 passed in 1 s", 1, "cuda", False),
    ],
)
def test_tests_that_did_not_run_are_no_success(
    says: str, status: int, device: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"print({says!r}); exit({status})"
    found = run(monkeypatch, "tests", script, device, 20)
    assert [row["ok"] for row in found["rows"]] == [right] and gpu._fine(found) == right


def test_a_device_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, timeout: float, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(SystemExit, match="does not answer within 60 s"):
        gpu.device_name("cuda")


@pytest.mark.parametrize("name", ["spans", "deterministic"])
def test_sections_that_need_no_kernel_of_a_gpu_run_over_tiny_sizes(name: str) -> None:
    found = gpu.run_section(name, "cpu", True, 120)
    assert not found["problem"], found
    assert len(found["rows"]) >= 2 and gpu._fine(found)


def test_a_kernel_that_cannot_be_made_is_wrong_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(device: torch.device, dtype: torch.dtype) -> Any:
        raise RuntimeError("no compiler")

    for device, fine in (("cuda", False), ("cpu", True)):
        gpu_checks._kernel("triton", refused, torch.bfloat16, torch.device(device), True)
        row = json.loads(capsys.readouterr().out[4:])
        assert row.get("ok", True) == fine and row["against"] == "no compiler"
