"""What is said on stderr holds nobody up, wherever it leads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_cp import log_stream
from ds_cp.log_stream import LogStream

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def read_all(end: int) -> str:
    parts = b""
    while part := os.read(end, 1 << 16):
        parts += part
    return parts.decode()


def test_text_arrives_as_it_was_written_in_whole_lines(pipe: Pipe) -> None:
    stream = LogStream(pipe[1])
    print("one", "ü", "\udc80", file=stream)
    stream.write("half ")
    assert stream.drain(5)
    print("a line", file=stream, flush=True)
    assert stream.drain(5)
    os.close(pipe[1])
    assert read_all(pipe[0]) == "one ü \\udc80\nhalf a line\n"


def test_a_pipe_that_nobody_reads(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for it, memory is bounded, and a reader who comes is told what is missing."""
    monkeypatch.setattr(log_stream, "LIMIT", 300_000)
    stream = LogStream(pipe[1])
    began = time.monotonic()
    for number in range(10_000):
        print(f"{number:99}", file=stream)
    assert not stream.drain(0.1)
    assert time.monotonic() - began < 5
    got = b""
    while len(got) < 300_000:
        got += os.read(pipe[0], 1 << 16)
    assert stream.drain(5)
    print("after", file=stream)
    assert stream.drain(5)
    os.close(pipe[1])
    kept = got.count(b"\n")
    assert read_all(pipe[0]) == (
        f"ds_cp: {10_000 - kept} lines are missing here: nobody read on\nafter\n"
    )


@pytest.mark.parametrize("leads", ["/dev/full", "closed"])
def test_what_cannot_be_written_is_no_error(leads: str) -> None:
    fd = os.open("/dev/full" if leads == "/dev/full" else os.devnull, os.O_WRONLY)
    if leads == "closed":
        os.close(fd)
    stream = LogStream(fd)
    print("lost", file=stream, flush=True)
    assert stream.drain(5)


def test_a_fork_writes_on_its_own(pipe: Pipe) -> None:
    stream = LogStream(pipe[1])
    print("parent", file=stream)
    assert stream.drain(5)
    child = os.fork()
    if child == 0:
        print("child", file=stream)
        os._exit(0 if stream.drain(5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    os.close(pipe[1])
    assert read_all(pipe[0]) == "parent\nchild\n"


def test_the_end_of_a_process_waits_only_so_long_for_its_words(pipe: Pipe, tmp_path: Path) -> None:
    """Also an error of the command line, and a rank that has used torch."""
    os.set_blocking(pipe[1], False)
    try:
        while True:
            os.write(pipe[1], b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(pipe[1], True)
    leave = "from ds_cp.process import leave_process; from ds_cp.log_stream import take_over; "
    leave += "import sys; take_over('stderr'); print('last', file=sys.stderr); leave_process(3)"
    for argv, code in ((["-c", leave], 3), (["-m", "ds_cp.cli", "generate", "--prompt", "x"], 2)):
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, *argv], stderr=pipe[1], stdout=pipe[1])
        try:
            assert process.wait(30) == code
        finally:
            process.kill()
        assert time.monotonic() - began < 30
