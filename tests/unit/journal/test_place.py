"""Directories that cannot hold a journal: each is refused in one line with the way out."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ds_cp.errors import LaunchError
from ds_cp.journal.place import Place


def refused(path: Path) -> str:
    with pytest.raises(LaunchError) as caught:
        Place(str(path))
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "new"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "new" / "lock").stat().st_mode) == 0o600
    place.close()
    Place(str(tmp_path / "new")).close()


def test_one_writer(tmp_path: Path) -> None:
    first = Place(str(tmp_path / "x"))
    assert "is in use by another ds-cp; end that one" in refused(tmp_path / "x")
    first.close()
    Place(str(tmp_path / "x")).close()


def test_a_dead_writer_leaves_no_lock(tmp_path: Path) -> None:
    """A child that outlives its parent by exec does not hold it."""
    code = (
        "import os, subprocess, sys; from ds_cp.journal.place import Place; "
        f"p = Place({str(tmp_path / 'x')!r}); "
        "subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL); "
        "print(flush=True); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    Place(str(tmp_path / "x")).close()


def test_others_may_read_it(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    assert "chmod 700" in refused(tmp_path / "open")


def test_others_may_read_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(mode=0o700)
    (tmp_path / "x" / "lock").touch(0o644)
    os.chmod(tmp_path / "x" / "lock", 0o644)
    assert "chmod 600" in refused(tmp_path / "x")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(mode=0o700)
    (tmp_path / "x" / "lock").symlink_to(tmp_path / "victim")
    refused(tmp_path / "x")
    assert not (tmp_path / "victim").exists()


def test_no_folder_to_be_in(tmp_path: Path) -> None:
    assert "make the folder that it is to be in" in refused(tmp_path / "no" / "x")


def test_it_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    refused(tmp_path / "x")


@pytest.mark.parametrize("number", [5, 22, 28, 30])  # EIO, EINVAL, ENOSPC, EROFS
def test_a_sync_that_fails(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    text = refused(tmp_path / "x")
    assert os.strerror(number) in text
    assert ("make room" if number == 28 else "on a local disk") in text
    monkeypatch.undo()
    Place(str(tmp_path / "x")).close()  # the lock was given back
