"""One supervisor of each host says when the model's files there change, and none ends by it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ds_cp.config import load_config
from ds_cp.model.watch import FilesWatch
from ds_cp.serve.preparations import watch_files
from ds_cp.topology.job import Job
from tests.helpers.engines import tiny_llama

JOB = Job(0, 4, 0, 2, None, "here", "python", "127.0.0.1", 0)


def watch(model: Path, rank: int, local_rank: int) -> FilesWatch | None:
    config = load_config({"model": str(model)})
    return watch_files(config, replace(JOB, rank=rank, local_rank=local_rank))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_one_process_of_each_host_watches(model: Path) -> None:
    for rank, local_rank, watches in ((0, 0, True), (1, 1, False), (2, 0, True), (3, 1, False)):
        assert (watch(model, rank, local_rank) is not None) == watches


def test_a_change_is_one_line_on_stderr(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = watch(model, 0, 0)
    assert files is not None
    os.utime(model / "config.json", ns=(1, 1))
    assert files.look()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ds_cp: warning: files of model {model} changed while it is served: ")


def test_a_stderr_that_is_closed_is_no_harm(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = watch(model, 0, 0)
    assert files is not None
    (model / "config.json").unlink()
    with Path(os.devnull).open("w") as closed:
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
        assert files.look()


def test_a_model_that_is_missing_here_is_the_workers_to_say(tmp_path: Path) -> None:
    assert watch(tmp_path / "none", 2, 0) is None
