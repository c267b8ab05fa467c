"""The driver of the GPU benchmark: a section that fails or hangs loses nothing but itself."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

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
    assert sum(seconds for seconds, _, _ in gpu.SECTIONS.values()) < 12 * 60
    assert gpu.LIMIT_S < 9 * 60
    for name, (_, ranks, module) in gpu.SECTIONS.items():
        argv = gpu.argv_of(name, "cuda", False)
        if module:
            assert callable(importlib.import_module(f"benchmarks.{module}").section)
            assert f"benchmarks.{module}" in argv and name in argv
            assert ("--standalone" in argv) == (ranks > 1)
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])
