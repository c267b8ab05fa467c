"""Where a job's secret comes from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_cp.errors import LaunchError
from ds_cp.topology.secret import MOST, VARIABLE, find_secret

WORD = "0123456789abcdef"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "secret"
    made.write_text(f"{WORD}\n")
    made.chmod(0o600)
    return made


def test_the_environment_comes_before_the_file(file: Path) -> None:
    assert find_secret({}, None) == b"" == find_secret({VARIABLE: ""}, None)
    assert find_secret({}, str(file)) == WORD.encode()
    assert find_secret({VARIABLE: f" {WORD[::-1]} "}, str(file)) == WORD[::-1].encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700 | 0o004])
def test_a_file_that_others_may_read_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(LaunchError, match=f"has mode {mode:04o}.*chmod 600"):
        find_secret({}, str(file))


@pytest.mark.parametrize("length", [0, 15, MOST + 1])
def test_a_secret_has_a_length(file: Path, length: int) -> None:
    file.write_text("x" * length)
    with pytest.raises(LaunchError, match="a secret has from 16 to 4096"):
        find_secret({}, str(file))
    if length:
        with pytest.raises(LaunchError, match=f"DS_CP_JOB_SECRET has {length} bytes"):
            find_secret({VARIABLE: "x" * length}, None)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="No such file"):
        find_secret({}, str(tmp_path / "none"))
    with pytest.raises(LaunchError, match="is not a file"):
        find_secret({}, str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(LaunchError, match="is not a file"):  # and is not waited for
        find_secret({}, str(tmp_path / "pipe"))


def test_the_secret_is_in_no_message(file: Path) -> None:
    file.write_text("hunter2")
    with pytest.raises(LaunchError) as caught:
        find_secret({}, str(file))
    assert "hunter2" not in str(caught.value)
