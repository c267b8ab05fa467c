"""Every command that the parser has, by its own words: ``--json`` and its twin do what they say,
and a failure is one line on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_cp.cli import main as cli
from ds_cp.cli.parser import flags, twin_of
from tests.helpers.terminal import variables
from tests.unit.cli.test_parser import leaves
from tests.unit.sizing.llama import SMALL
from tests.unit.trace.test_summary import written

# What ends at once by something that the user has given.
FAILS = {
    "serve": "--model /no/model",
    "generate": "--model /no/model --prompt x",
    "batch": "none.jsonl out.jsonl --model /no/model",
    "config check": "none.json",
    "config explain": "none.json",
    "chat": "x --url ?",
    "top": "--url ?",
    "plan": "--model none --device cpu --context 1K",
    "bench latency": "--model /no/model",
    "bench throughput": "--model /no/model",
    "bench serve": "--url ?",
    "bench comm": "--out /no/folder/file",
    "bench kv": "--blocks 0",
    "trace summary": "none.json",
    "completion": "tcsh",
}
# These have nothing that could be wrong.
CANNOT_FAIL = {"config schema", "doctor", "version"}
# What ends by itself here, without a server, a model or ranks. The others' objects are looked at
# where these are, or are measured: test_json (serve), test_cli, test_batch, test_bench and
# test_sizing beside this file, tests/server/test_cli_chat and test_cli_top.
HERE = {
    "config schema": [""],
    "config check": ["CONFIG CONFIG"],
    "config explain": ["CONFIG"],
    "version": [""],
    "plan": ["--model MODEL --device h100 --context 64K --hosts 2 --ranks-per-host 2"],
    "trace summary": ["TRACE"],
    "completion": ["bash", "zsh", "fish"],
}
NEED_MORE = {"serve", "generate", "batch", "chat", "top", "doctor", "bench latency",
             "bench throughput", "bench serve", "bench comm", "bench kv"}  # fmt: skip


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_CP_LAUNCHER", *variables()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "HEAD_START_S", 0.0)


def twin_of_json(path: str) -> str:
    parser = leaves()[path]
    [action] = [a for a in flags(parser) if "--json" in a.option_strings]
    twin = twin_of(parser.prog, action)
    assert twin is not None
    return twin


def test_every_command_is_here() -> None:
    assert set(leaves()) == FAILS.keys() | CANNOT_FAIL == HERE.keys() | NEED_MORE


@pytest.mark.parametrize("how", ["flag", "twin"])
@pytest.mark.parametrize("path", FAILS)
def test_a_failure_is_one_line_and_stdout_is_empty(
    path: str, how: str, capfd: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*path.split(), *FAILS[path].split()]
    if how == "twin":
        monkeypatch.setenv(twin_of_json(path), "1")
    assert cli.main([*argv, "--json"] if how == "flag" else argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ds_cp: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "words"), [(path, words) for path, some in HERE.items() for words in some]
)
def test_json_is_alone_on_stdout_by_flag_and_by_twin(
    path: str, words: str, capfd: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": "m"}))
    (tmp_path / "model.json").write_text(json.dumps(SMALL))
    (tmp_path / "trace.json").write_text(written())
    monkeypatch.chdir(tmp_path)
    files = {"CONFIG": "config.json", "MODEL": "model.json", "TRACE": "trace.json"}
    argv = [*path.split(), *(files.get(word, word) for word in words.split())]

    def run(*more: str) -> str:
        assert cli.main([*argv, *more]) == 0
        return str(capfd.readouterr().out)

    text, by_flag = run(), run("--json")
    assert by_flag.isascii() and by_flag.endswith("\n")
    found = [json.loads(line) for line in by_flag.splitlines()]
    assert found and all(isinstance(one, dict) for one in found)
    monkeypatch.setenv(twin_of_json(path), "yes")
    assert run() == by_flag != text
