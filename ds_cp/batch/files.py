"""The files of a batch: answers, continued after an interruption, and errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ds_cp.batch.runner import Problem
from ds_cp.errors import DsCpError, LaunchError
from ds_cp.text import parse_json

MAX_ANSWER_BYTES = 1 << 30
NOT_FINAL = (408, 425, 429, 499)  # 4xx that say nothing about the request
_BEGINS = b'{"id": "batch_req_'


class AnswerFile:
    """Where answers go, a whole line a write.

    ``done``: the ids whose answers stand already, with whether they were refused; ``again``: how
    many answers were taken out to be asked for again.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        size: int | None,
        done: Mapping[str, bool] | None = None,
        again: int = 0,
        held: BinaryIO | None = None,
    ) -> None:
        self.done = done or {}
        self.again = again
        self._fd = fd
        self._name = name
        self._size = size  # None: it can only be written to
        self._held = held

    def append(self, line: bytes) -> None:
        """Write a line. ``LaunchError`` when it cannot be written; then no part of it is there."""
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._size is not None:
                os.ftruncate(self._fd, self._size)
            raise LaunchError(
                f"cannot write {self._name}: {error.strerror or error}; the answers so far are in "
                f"it, run the same command again to do the rest"
            ) from None
        if self._size is not None:
            self._size += len(line)

    def close(self) -> None:
        """Bring the file to the disk. Stdout stays open."""
        if self._size is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
        if self._held is not None:
            self._held.close()


def open_answers(path: str) -> AnswerFile:
    """A file for answers, resumed when it is there: the start of a line that an earlier run was
    killed in is cut off, and answers that say nothing about their request are taken out.

    Raises ``LaunchError`` when it cannot be written, is in use by another batch, or holds something
    else than answers (nothing is changed then).
    """
    try:
        file = open(path, "a+b", buffering=1 << 20)
        try:
            _lock(file, path)
            done, end, again = _scan(file, path)
            fd = _replaced(file, path, end) if again else _continued(file, end)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise LaunchError(f"cannot write {path}: {error.strerror or error}") from None
    return AnswerFile(fd, path, os.fstat(fd).st_size, done, again, held=file)


def _lock(file: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise LaunchError(
                f"{path} is being written by another ds-cp batch; wait for it, or name another file"
            ) from None  # a file system without locks goes without


def _scan(file: BinaryIO, path: str) -> tuple[dict[str, bool], int, int]:
    """The ids that are done with, where the whole lines end, and how many are to be done again."""
    done: dict[str, bool] = {}
    again = 0
    end = 0
    file.seek(0)
    for number, line in enumerate(_lines(file), start=1):
        try:
            custom_id, status = _answer_of(line)
        except ValueError:
            torn = not line.endswith(b"\n")
            if torn and (line.startswith(_BEGINS) or _BEGINS.startswith(line)):
                break
            raise LaunchError(
                f"{path} line {number} is not an answer of a batch; name another file for the "
                f"answers, or remove the line"
            ) from None
        end += len(line)
        if _is_final(status):
            done[custom_id] = status >= 400
        else:
            again += 1
    return done, end, again


def _continued(file: BinaryIO, end: int) -> int:
    """A descriptor to append at the end of the whole lines."""
    fd = os.dup(file.fileno())
    os.ftruncate(fd, end)
    if end and os.pread(fd, 1, end - 1) != b"\n":
        os.write(fd, b"\n")
    return fd


def _replaced(file: BinaryIO, path: str, end: int) -> int:
    """A descriptor of the file that takes its place, with the final answers alone. Until that is
    whole and on the disk, the old one stays as it is."""
    place = os.path.realpath(path)
    beside = f"{place}.{os.getpid()}.tmp"
    fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        with open(os.dup(fd), "wb") as new:
            _lock(new, path)
            file.seek(0)
            position = 0
            for line in _lines(file):
                position += len(line)
                if position > end:
                    break
                if _is_final(_answer_of(line)[1]):
                    new.write(line if line.endswith(b"\n") else line + b"\n")
            new.flush()
            os.fsync(fd)
        shutil.copymode(place, beside)
        os.replace(beside, place)
    except BaseException:
        os.close(fd)
        os.unlink(beside)
        raise
    return fd


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(MAX_ANSWER_BYTES):
        yield line


def _answer_of(line: bytes) -> tuple[str, int]:
    """Id and status of a line of answers; 500 where there was none. ``ValueError`` when it is
    something else."""
    if not line.startswith(b"{"):
        raise ValueError("not an object")
    value: Any = parse_json(line.decode())
    custom_id, response = value.get("custom_id"), value.get("response")
    status = 500 if response is None and value.get("error") else None
    if isinstance(response, dict):
        status = response.get("status_code")
    if not isinstance(custom_id, str) or not isinstance(status, int):
        raise ValueError("no answer")
    return custom_id, status


def _is_final(status: int) -> bool:
    return status < 500 and status not in NOT_FINAL


class ErrorFile:
    """The broken lines of this run, one JSON object each; without any there is no file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.used = False
        self._file: TextIO | None = None
        try:
            Path(path).unlink(missing_ok=True)  # of an earlier run
        except OSError as error:
            raise self._cannot(error) from None

    def add(self, problem: Problem) -> None:
        """Note one. ``LaunchError`` when that cannot be written."""
        error = {"message": problem.message, "code": problem.code}
        line = {"line": problem.line, "custom_id": problem.custom_id, "error": error}
        try:
            if self._file is None:
                self._file = open(self.path, "w", encoding="utf-8", buffering=1)
                self.used = True
            self._file.write(json.dumps(line) + "\n")
        except OSError as error_of_system:
            raise self._cannot(error_of_system) from None

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _cannot(self, error: OSError) -> DsCpError:
        return LaunchError(f"cannot write {self.path}: {error.strerror or error}")
