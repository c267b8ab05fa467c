"""The files that a batch writes: answers, which a later run continues, and broken lines."""

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

from ds_cp.batch.format import Problem
from ds_cp.errors import DsCpError, LaunchError
from ds_cp.text import parse_json

MAX_ANSWER_BYTES = 1 << 30  # bytes of one line, at most
NOT_FINAL = (408, 425, 429, 499)  # 4xx that do not depend on the request: asked again
_BEGINS = b'{"id": "batch_req_'  # how every line begins


class AnswerFile:
    """Appends answers, a whole line at a time.

    ``done``: the ids that have a final answer, and whether it is a refusal. ``again``: the number
    of answers that were removed because their requests have to be asked again.
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
        """Write a line. Raises ``LaunchError`` when that fails, and leaves no part of it."""
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except BrokenPipeError:
            raise
        except OSError as err:
            if self._size is not None:
                os.ftruncate(self._fd, self._size)
            way_out = (
                "redirect it to where there is room"  # such a batch starts anew
                if self._size is None
                else "the answers so far are in it; with room, run the same command again"
            )
            raise LaunchError(
                f"cannot write {self._name}: {err.strerror or err}; {way_out}"
            ) from None
        if self._size is not None:
            self._size += len(line)

    def close(self) -> None:
        """Sync the file to the disk and close it. Stdout stays open."""
        if self._size is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
        if self._held is not None:
            self._held.close()


def open_answers(path: str) -> AnswerFile:
    """The file for answers at ``path``, new or continued.

    Of a file that exists, an unfinished last line (its run was killed) is cut off, and answers that
    are not final are removed. Raises ``LaunchError`` when the file cannot be written, is in use by
    another batch, or has a line that is not an answer; such a file is not changed.
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
    except OSError as err:
        raise LaunchError(f"cannot write {path}: {err.strerror or err}") from None
    return AnswerFile(fd, path, os.fstat(fd).st_size, done, again, held=file)


def _lock(file: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise LaunchError(
                f"{path} is being written by another ds-cp batch; wait for it, or name another file"
            ) from None  # other errors: the file system has no locks


def _scan(file: BinaryIO, path: str) -> tuple[dict[str, bool], int, int]:
    """The ids with a final answer, the byte where the whole lines end, and the number of answers
    that are not final."""
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
                f"{path} line {number} is not an answer of a batch; "
                "name another file for the answers, or remove the line"
            ) from None
        end += len(line)
        if _is_final(status):
            done[custom_id] = status >= 400
        else:
            again += 1
    return done, end, again


def _continued(file: BinaryIO, end: int) -> int:
    """A descriptor that appends after the whole lines."""
    fd = os.dup(file.fileno())
    os.ftruncate(fd, end)
    if end and os.pread(fd, 1, end - 1) != b"\n":
        os.write(fd, b"\n")
    return fd


def _replaced(file: BinaryIO, path: str, end: int) -> int:
    """A descriptor of a new file in its place, with the final answers only. The old file stays
    until the new one is whole and on the disk."""
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
    """Id and HTTP status of an answer; 500 for a request without one. Raises ``ValueError`` for any
    other line."""
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
    """The broken lines of this run, one JSON object each; the file is made for the first one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.used = False
        self._file: TextIO | None = None
        try:
            Path(path).unlink(missing_ok=True)  # of an earlier run
        except OSError as err:
            raise self._cannot(err) from None

    def add(self, problem: Problem) -> None:
        """Write a line about one. Raises ``LaunchError`` when that fails."""
        error = {"message": problem.message, "code": problem.code}
        line = {"line": problem.line, "custom_id": problem.custom_id, "error": error}
        try:
            if self._file is None:
                self._file = open(self.path, "w", encoding="utf-8", buffering=1)
                self.used = True
            self._file.write(json.dumps(line) + "\n")
        except OSError as err:
            raise self._cannot(err) from None

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _cannot(self, err: OSError) -> DsCpError:
        return LaunchError(f"cannot write {self.path}: {err.strerror or err}")
