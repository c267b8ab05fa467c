"""A stdout that is closed, full, unread or of another encoding: one line of cause, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ds_cp.cli import main as cli

ROOT = Path(__file__).resolve().parents[3]
TEXT = "caf\u00e9 \udc80"  # a lone surrogate cannot be encoded at all

# The real command over an engine that answers every prompt with TEXT.
RUN = """
import sys, types
from ds_cp.outputs import CompletionOutput, RequestMetrics, RequestOutput
TEXT, many = {text!r}, {many}

class Engine:
    is_driver = True
    def summary(self): return ["1 host"]
    def shutdown(self): pass
    def generate(self, prompts, params, progress):
        done = CompletionOutput(index=0, text=TEXT, token_ids=(3,), finish_reason="length")
        return [RequestOutput(request_id="0", prompt="x", prompt_token_ids=(1,), outputs=(done,),
                              finished=True, metrics=RequestMetrics(arrival_time=1.0))] * many

module = types.ModuleType("ds_cp.engine.llm")
module.init_inference = lambda *args, **rest: Engine()
sys.modules["ds_cp.engine.llm"] = module
from ds_cp.cli import doctor, run
doctor.run_probe = lambda command: (False, "not looked at")
run(sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config, of a name that is not ASCII, whose model folder looks whole."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "caf\u00e9.json").write_text(json.dumps({"model": str(model)}))
    (tmp_path / "in.jsonl").write_text("{}\n")
    return tmp_path


CONFIG = "caf\u00e9.json"
GENERATE = ("generate", "--config", CONFIG, "--prompt", "x")
VERBS = {
    "generate": GENERATE,
    "generate --json": (*GENERATE, "--json"),
    "config schema": ("config", "schema"),
    "config check": ("config", "check", CONFIG),
    "config explain": ("config", "explain", CONFIG),
    "doctor": ("doctor",),
    "doctor --json": ("doctor", "--json"),
    "version": ("version",),
    "version --json": ("version", "--json"),
    "help": ("generate", "--help"),
}


def execute(
    folder: Path,
    argv: tuple[str, ...],
    stdout: int | None,
    env: Mapping[str, str] | None = None,
    many: int = 1,
) -> subprocess.CompletedProcess[bytes]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONIOENCODING", "PYTHONUTF8")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, script(folder, TEXT, many), *argv]
    if stdout is None:  # closed, as a shell does it
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    return subprocess.run(
        command,
        cwd=folder,
        env=plain | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
    )


def script(folder: Path, text: str, many: int) -> str:
    file = folder / "ds-cp.py"
    file.write_text(
        RUN.replace("TEXT, many = {text!r}, {many}", f"TEXT, many = {ascii(text)}, {many}")
    )
    return str(file)


def failed_in_one_line(done: subprocess.CompletedProcess[bytes], cause: str) -> None:
    lines = done.stderr.decode().splitlines()
    errors = [line for line in lines if line != "1 host"]
    assert len(errors) == 1 and errors[0].startswith("ds_cp: error: ") and cause in errors[0], lines
    assert done.returncode == 2


@pytest.mark.parametrize("name", VERBS)
def test_a_full_disk(folder: Path, name: str) -> None:
    with open("/dev/full", "w") as full:
        done = execute(folder, VERBS[name], full.fileno())
    failed_in_one_line(done, "cannot write to stdout: No space left on device")


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("many", [1, 100])  # within the buffer, and beyond it
def test_a_reader_that_has_left(folder: Path, name: str, many: int) -> None:
    if many > 1 and VERBS[name][0] != "generate":
        return
    read, write = os.pipe()
    os.close(read)
    try:
        done = execute(folder, VERBS[name], write, many=many)
    finally:
        os.close(write)
    failed_in_one_line(done, "its reader has left")


@pytest.mark.parametrize("name", [name for name in VERBS if name != "help"])
def test_closed(folder: Path, name: str) -> None:
    done = execute(folder, VERBS[name], None)
    failed_in_one_line(done, "stdout is closed")
    assert b"1 host" not in done.stderr  # before anything is loaded


def test_closed_is_said_before_ranks_are_started(folder: Path) -> None:
    failed_in_one_line(execute(folder, (*GENERATE, "--ranks", "2"), None), "stdout is closed")


@pytest.mark.parametrize(
    ("target", "cause"), [("-", "stdout is closed"), ("out.jsonl", "in.jsonl line 1")]
)
def test_a_batch_needs_stdout_only_for_its_answers(folder: Path, target: str, cause: str) -> None:
    """With a file it gets as far as the model."""
    done = execute(folder, ("batch", "none.jsonl", target, "--config", CONFIG), None)
    failed_in_one_line(done, cause if target == "-" else "cannot read none.jsonl")


def test_stderr_that_is_closed_or_full_ends_nothing(folder: Path) -> None:
    for to in (">&-", ">/dev/full"):
        run = [sys.executable, script(folder, "fine", 1), *GENERATE]
        command = ["sh", "-c", f'exec "$@" 2{to}', "sh", *run]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, b"fine\n"), to


ENCODINGS = {
    "utf-8": {"PYTHONUTF8": "1"},
    "ascii": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    "C locale": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_results_are_utf8_in_every_locale(folder: Path, encoding: str) -> None:
    (folder / "config.json").write_text((folder / CONFIG).read_text())
    argv = ("generate", "--config", "config.json", "--prompt", "x")
    assert output(folder, argv, encoding) == b"caf\xc3\xa9 \\udc80\n"
    (line,) = output(folder, (*argv, "--json"), encoding).splitlines()
    assert json.loads(line)["outputs"][0]["text"] == TEXT


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("utf-8", b"caf\xc3\xa9.json: OK\n"),
        ("ascii", b"caf\\xe9.json: OK\n"),
        ("C locale", b"caf\\udcc3\\udca9.json: OK\n"),  # Python does not know these bytes there
    ],
)
def test_reports_escape_what_stdout_cannot_encode(folder: Path, encoding: str, line: bytes) -> None:
    assert output(folder, ("config", "check", CONFIG), encoding) == line
    assert output(folder, ("config", "explain", CONFIG), encoding)


def output(folder: Path, argv: tuple[str, ...], encoding: str) -> bytes:
    with (folder / "out").open("wb") as file:
        done = execute(folder, argv, file.fileno(), ENCODINGS[encoding])
    assert done.returncode == 0, done.stderr
    return (folder / "out").read_bytes()


def test_another_rank_needs_no_stdout(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "prepare_streams", lambda: False)
    assert cli.main(["version"]) == 0
    assert "ds_cp" in capfd.readouterr().out
