"""The file of answers: continued after an interruption, never torn, never another's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ds_cp.batch.files import AnswerFile, open_answers
from ds_cp.errors import LaunchError
from tests.helpers.batches import answer_line


def reopened(path: Path, *more: bytes) -> AnswerFile:
    file = open_answers(str(path))
    for data in more:
        file.append(data)
    file.close()
    return file


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "out"
    before, last = answer_line("a") + answer_line("b", 400), answer_line("ü", text="x" * 50)
    for cut in range(len(last)):
        path.write_bytes(before + last[:cut])
        file = reopened(path, answer_line("c"))
        if cut < len(last) - 1:
            assert path.read_bytes() == before + answer_line("c")
            assert file.done == {"a": False, "b": True}
        else:  # only the line end is missing: it is an answer
            assert path.read_bytes() == before + last + answer_line("c")
            assert file.done == {"a": False, "b": True, "ü": False}


def test_answers_that_say_nothing_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "out"
    keep = [answer_line("a"), answer_line("d", 404), answer_line("f")]
    again = [answer_line("b", 500), answer_line("c", 429), answer_line("e", None)]
    torn = answer_line("g")[:-9]
    path.write_bytes(
        keep[0] + again[0] + again[1] + keep[1] + again[2] + keep[2] + answer_line("h", 503) + torn
    )
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    file = reopened(tmp_path / "link", answer_line("b"))
    assert path.read_bytes() == b"".join(keep) + answer_line("b")
    assert (file.done, file.again) == ({"a": False, "d": True, "f": False}, 4)
    assert path.stat().st_mode & 0o777 == 0o640 and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


@pytest.mark.parametrize(
    "data",
    [
        b"my notes",
        b"my notes\n",
        b'{"custom_id": "a"}\n',
        b'{"custom_id": "a", "response": {}}\n',
        b"[1]\n",
        b"\x7fELF",
        b"{",
        b'{"id": "batch_req_1", "custom_id": "a", "resp\n',  # a line end within: not torn by us
    ],
)
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, data: bytes) -> None:
    if data == b"{":  # the first byte of a torn answer
        assert reopened_bytes(tmp_path, answer_line("a") + data) == answer_line("a")
        return
    path = tmp_path / "out"
    for before in (b"", answer_line("a") + answer_line("b", 500)):
        path.write_bytes(before + data)
        with pytest.raises(LaunchError, match="is not an answer of a batch"):
            open_answers(str(path))
        assert path.read_bytes() == before + data


def reopened_bytes(tmp_path: Path, data: bytes) -> bytes:
    path = tmp_path / "out"
    path.write_bytes(data)
    reopened(path)
    return path.read_bytes()


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(answer_line("a", 500))  # so that the file is replaced
    file = open_answers(str(path))
    with pytest.raises(LaunchError, match="being written by another"):
        open_answers(str(path))
    file.close()
    open_answers(str(path)).close()


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "out"
    file = open_answers(str(path))
    file.append(answer_line("a"))
    real = os.write
    calls = 0

    def half(fd: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return real(fd, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(LaunchError, match="No space left on device; .* run the same command again"):
        file.append(answer_line("b"))
    monkeypatch.undo()
    assert path.read_bytes() == answer_line("a")
    file.append(answer_line("c"))
    file.close()
    assert path.read_bytes() == answer_line("a") + answer_line("c")
