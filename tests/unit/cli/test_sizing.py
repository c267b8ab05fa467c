"""``ds-cp plan`` and ``ds-cp bench comm``: what is printed, and one line for each wrong flag."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_cp.cli import main as cli
from ds_cp.sizing import picture
from ds_cp.sizing.device import read_device

ROOT = Path(__file__).resolve().parents[3]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_CP_LAUNCHER", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "HEAD_START_S", 0.0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


def plan(model: str, *more: str) -> list[str]:
    given = {"--hosts": "4", "--ranks-per-host": "8", "--device": "h100", "--context": "1M"}
    flags = dict(zip(more[::2], more[1::2], strict=False))
    return ["plan", "--model", model, *(x for pair in (given | flags).items() for x in pair)]


def test_text_and_json(capfd: pytest.CaptureFixture[str], model: str) -> None:
    assert cli.main(plan(model)) == 0
    text = capfd.readouterr().out
    assert text.startswith("llama-8b (llama): 8.03 B parameters, 32 layers")
    assert "4 hosts x 8 ranks of h100: context over 32, layers over 1; bf16" in text
    for part in ("largest context by number of ranks", "ring, pass-KV", "ring, pass-Q", "tree",
                 "assumptions", "TTFT", "TPOT", "# weights", "= kv"):  # fmt: skip
        assert part in text
    assert cli.main([*plan(f"{model}/config.json"), "--json"]) == 0
    out = capfd.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and found["job"]["context"] == 1 << 20
    assert found["model"]["parameters"] == 8_030_261_248


def test_dtype_is_the_checkpoint_s_unless_given(
    capfd: pytest.CaptureFixture[str], model: str
) -> None:
    for flags, dtype in (
        ((), "bf16"),
        (("--dtype", "fp32"), "fp32"),
        (("--dtype", "auto"), "bf16"),
    ):
        assert cli.main([*plan(model, *flags), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["job"]["dtype"] == dtype


def test_a_device_of_one_s_own(
    capfd: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    mine = read_device("cpu").model_dump() | {"name": "my-box"}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    assert cli.main(plan(model, "--device", str(tmp_path / "mine.json"))) == 2, (
        "hop_us has no source"
    )
    capfd.readouterr()
    del mine["hop_us"]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    assert cli.main(plan(model, "--device", str(tmp_path / "mine.json"))) == 0
    assert "ranks of my-box" in capfd.readouterr().out


def test_a_picture(capfd: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs it: pip install 'ds_cp[bench]'")
    file = tmp_path / "p.png"
    assert cli.main([*plan(model), "--png", str(file)]) == 0
    assert "assumptions" in capfd.readouterr().out
    raw = file.read_bytes()
    assert raw.startswith(PNG) and len(raw) > 10_000


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--model", "none"), "no directory or config.json at none"),
        (("--model", ""), "--model is empty"),
        (("--model", "a\0b"), "no directory"),
        (("--hosts", "0"), "--hosts is 0; it must be from 1 to 1024"),
        (("--hosts", "x"), "invalid int value: 'x'"),
        (("--hosts", "1e3"), "invalid int value"),
        (("--ranks-per-host", "-1"), "--ranks-per-host is -1"),
        (("--ranks-per-host", "1024"), "a job has at most 1024"),
        (("--device", "h1000"), "did you mean h100?"),
        (("--device", ""), "is no file"),
        (("--context", "1G"), "--context is '1G'"),
        (("--context", "0"), "--context is 0"),
        (("--context", "999999999M"), "--context is"),
        (("--dtype", "fp8"), "--dtype is fp8; it must be one of fp32, bf16, fp16"),
        (("--tp", "3"), "--tp 3 does not divide --ranks-per-host 8"),
        (("--tp", "0"), "--tp is 0"),
        (("--png", "p.jpg"), "must end in .png"),
        (("--png", "no/such/dir/p.png"), "there is no directory no/such/dir"),
        (("--frob", "1"), "--frob"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_each_wrong_flag_is_one_line(
    capfd: pytest.CaptureFixture[str], model: str, flags: tuple[str, str], part: str
) -> None:
    assert cli.main(plan(model, *flags)) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("ds_cp: error: ") and err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize("flag", ["--model", "--device", "--context"])
def test_what_is_needed_is_asked_for(
    capfd: pytest.CaptureFixture[str], model: str, flag: str
) -> None:
    argv = plan(model)
    at = argv.index(flag)
    assert cli.main(argv[:at] + argv[at + 2 :]) == 2
    assert flag in capfd.readouterr().err


def test_without_matplotlib_the_way_out_is_said(
    capfd: pytest.CaptureFixture[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(picture.importlib, "import_module", absent)
    assert cli.main([*plan(model), "--png", str(tmp_path / "p.png")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "pip install 'matplotlib>=3.8'" in err and err.count("\n") == 1


def test_neither_torch_nor_weights_are_touched(model: str) -> None:
    code = (
        "import sys; from ds_cp.cli.main import main\n"
        f"code = main({plan(model)!r})\n"
        "bad = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code or (f'loads {bad}' if bad else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["bench"], "kind"),
        (["bench", "frob"], "frob"),
        (["bench", "comm", "--ranks", "2"], "--out"),
        (["bench", "comm", "--out", "d.json"], "--ranks is None; it must be from 2 to 1024"),
        (["bench", "comm", "--out", "d.json", "--ranks", "1"], "--ranks is 1"),
        (["bench", "comm", "--out", "d.json", "--ranks", "x"], "invalid int value"),
        (["bench", "comm", "--out", "no/dir/d.json", "--ranks", "2"], "cannot be written"),
        (["bench", "comm", "--out", ".", "--ranks", "2"], "cannot be written"),
        (["bench", "comm", "--out", "d.json", "--ranks", "2", "--dtype", "int8"], "--dtype is"),
        (["bench", "comm", "--out", "d.json", "--ranks", "2", "--name", ""], "--name must be"),
        (["bench", "comm", "--out", "d.json", "--ranks", "2", "--name", "a\nb"], "--name must"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_flags_of_bench_comm(
    capfd: pytest.CaptureFixture[str], argv: list[str], part: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and part in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_starts_the_ranks_itself(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = str(tmp_path / "d.json")
    assert cli.main(["bench", "comm", "--out", out, "--ranks", "2"]) == 2
    assert "leave --ranks out" in capfd.readouterr().err


def test_two_ranks_measure_this_machine(tmp_path: Path, model: str) -> None:
    """The file is one that ``ds-cp plan`` takes, and its numbers are of a machine."""
    out = tmp_path / "here.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "ds_cp.cli", "bench", "comm", "--ranks", "2", "--out", str(out),
         "--dtype", "fp32", "--name", "here", "--json"],
        capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(out.read_text())
    device = read_device(str(out))
    rates = device.rates["fp32"]
    assert 1e-4 < rates.linear_tflops < 100 and 1e-4 < rates.attention_tflops < 100
    assert 0.05 < device.memory.gb_per_s < 5000 and 0.01 < device.memory.gib < 1 << 20
    assert 0.01 < device.links.intra_host.gb_per_s < 1000
    assert 0.1 < device.links.intra_host.latency_us < 1e6
    assert 1 < device.layer_us < 1e6
    assert cli.main(plan(model, "--device", str(out), "--dtype", "fp32")) == 0
