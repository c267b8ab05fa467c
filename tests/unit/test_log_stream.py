"""What is said on stderr holds nobody up, wherever it leads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
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
    assert stream.drain(60)
    print("a line", file=stream, flush=True)
    assert stream.drain(60)
    os.close(pipe[1])
    assert read_all(pipe[0]) == "one ü \\udc80\nhalf a line\n"


def test_its_thread_rests_and_starts_again(pipe: Pipe) -> None:
    """A process that forks has none meanwhile."""

    def writers() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name == "ds_cp log"]

    before = writers()
    stream = LogStream(pipe[1])
    stream.rest()
    for word in ("one", "two", "three"):
        print(word, file=stream)
        assert writers() != before
        stream.rest(60)
        assert writers() == before
    os.close(pipe[1])
    assert read_all(pipe[0]) == "one\ntwo\nthree\n"


def test_a_pipe_that_nobody_reads(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for it, memory is bounded, and a reader who comes is told what is missing."""
    monkeypatch.setattr(log_stream, "LIMIT", 300_000)
    stream = LogStream(pipe[1])
    began = time.monotonic()
    for number in range(10_000):
        print(f"{number:99}", file=stream)
    assert not stream.drain(0.1)
    assert time.monotonic() - began < 60  # with a pipe that blocks it would not end
    got = b""
    while not stream.drain(0.05):  # what waits fills the pipe, so there is something to read
        got += os.read(pipe[0], 1 << 16)
    print("after", file=stream)
    assert stream.drain(60)
    os.close(pipe[1])
    *lines, last = (got.decode() + read_all(pipe[0])).splitlines()
    assert last == "after" and len(lines) < 5000
    expected = 0  # a note stands where lines are missing: how often depends on when the thread ran
    for line in lines:
        if note := re.fullmatch(r"ds_cp: (\d+) lines are missing here: nobody read on", line):
            expected += int(note[1])
        else:
            assert int(line) == expected
            expected += 1
    assert expected == 10_000


@pytest.mark.parametrize("leads", ["/dev/full", "closed"])
def test_what_cannot_be_written_is_no_error(leads: str) -> None:
    fd = os.open("/dev/full" if leads == "/dev/full" else os.devnull, os.O_WRONLY)
    if leads == "closed":
        os.close(fd)
    stream = LogStream(fd)
    print("lost", file=stream, flush=True)
    assert stream.drain(60)


@pytest.mark.parametrize("says", ["child", ""])
def test_a_fork_writes_on_its_own(pipe: Pipe, says: str) -> None:
    """Also when something of the parent's waits, and the lock is taken; with nothing to write it
    waits for nothing."""
    stream = LogStream(pipe[1])
    print("parent", file=stream)
    assert stream.drain(60)
    stream.write("parent's half")
    with stream._changed:
        stream._waiting += 9
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            if says:
                print(says, file=stream)
            stream.flush()
            os._exit(0 if stream.drain(60) else 1)
        assert os.waitpid(child, 0)[1] == 0
        stream._waiting -= 9
    os.close(pipe[1])
    assert read_all(pipe[0]) == "parent\n" + (f"{says}\n" if says else "")


def test_what_libraries_ask_of_stderr(pipe: Pipe) -> None:
    stream = LogStream(pipe[1])
    stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # type: ignore
    stream.buffer.write("bytes ü".encode())
    stream.buffer.flush()
    print("", stream.encoding, stream.errors, stream.buffer.fileno() == pipe[1], file=stream)
    assert stream.drain(60)
    os.close(pipe[1])
    assert read_all(pipe[0]) == "bytes ü utf-8 backslashreplace True\n"


def test_one_write_above_the_limit_is_cut(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole lines where there are any, and what is missing is said."""
    monkeypatch.setattr(log_stream, "LIMIT", 10_000)
    stream = LogStream(pipe[1])
    for text in ("line\n" * 2500, "x" * 10_050 + "\n", "end\n"):
        stream.write(text)
        assert stream.drain(60)
    os.close(pipe[1])
    note = "ds_cp: {} lines are missing here: nobody read on\n"
    want = "line\n" * 2000 + note.format(500) + "x" * 10_000 + note.format(1) + "end\n"
    assert read_all(pipe[0]) == want


def test_lines_of_two_ranks_do_not_tear(pipe: Pipe) -> None:
    """Which both wait for room in a pipe."""
    line = "x" * 1200 + "\n"
    children = []
    for letter in "ab":
        children.append(child := os.fork())
        if child == 0:
            stream = LogStream(pipe[1])
            stream.write(line.replace("x", letter) * 300)
            os._exit(0 if stream.drain(20) else 1)
    os.close(pipe[1])
    time.sleep(0.3)  # now it is full
    got = read_all(pipe[0])
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert sorted(got.splitlines(True)) == [line.replace("x", c) for c in "ab" for _ in range(300)]


IN_ORDER = """
import sys
from ds_cp.cli import main, verbs
from ds_cp.cli.output import flush, put, say

def verb(args, env):
    for number in range(100):
        say(f"stderr {number}")
        put(f"stdout {number}")
        flush()
    return 0

verbs._version = verb
main.run(["version"])
"""


def test_stderr_of_a_verb_comes_in_order_with_its_results(tmp_path: Path) -> None:
    with (tmp_path / "both").open("wb") as both:
        argv = [sys.executable, "-c", IN_ORDER]
        assert subprocess.run(argv, stdout=both, stderr=both, timeout=60).returncode == 0
    want = [f"{name} {number}" for number in range(100) for name in ("stderr", "stdout")]
    assert (tmp_path / "both").read_text().splitlines() == want


def test_the_end_of_a_process_waits_only_so_long_for_its_words(pipe: Pipe, tmp_path: Path) -> None:
    """Also an error of a server's command line, and a rank that has used torch."""
    os.set_blocking(pipe[1], False)
    try:
        while True:
            os.write(pipe[1], b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(pipe[1], True)
    leave = "from ds_cp.process import leave_process; from ds_cp.log_stream import take_over; "
    leave += "import sys; take_over('stderr'); print('last', file=sys.stderr); leave_process(3)"
    for argv, code in ((["-c", leave], 3), (["-m", "ds_cp.cli", "serve"], 2)):
        process = subprocess.Popen([sys.executable, *argv], stderr=pipe[1], stdout=pipe[1])
        try:
            assert process.wait(120) == code
        finally:
            process.kill()


JSON_LINES = """
import logging, sys
from ds_cp.log_stream import drain_streams, say, say_object, take_over, write_json_lines
take_over("stdout", "stderr")
write_json_lines()
say("error: one")
say_object({"time": 1.5, "event": "request"})
print("plain \\udc80", "\\n\\ntwo lines", file=sys.stderr)
print("ready")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("ds_cp.api").exception("request %s failed", "x")
logging.getLogger("ds_cp.api").debug("not this")
logging.getLogger("ds_cp.api").warning("of %d", "no number")
drain_streams(60)
"""


def test_every_line_as_an_object() -> None:
    done = subprocess.run([sys.executable, "-c", JSON_LINES], capture_output=True, timeout=60)
    [ready] = map(json.loads, done.stdout.splitlines())
    assert (ready["level"], ready["message"]) == ("info", "ready") and ready["time"] > 1e9
    error, event, plain, two, failed, odd = map(json.loads, done.stderr.splitlines())
    assert (error["level"], error["message"]) == ("error", "error: one")
    assert event == {"time": 1.5, "event": "request"}
    assert (plain["message"], two["message"]) == ("plain \\udc80 ", "two lines")
    assert (failed["level"], failed["logger"]) == ("error", "ds_cp.api")
    assert failed["message"] == "request x failed"
    assert "ZeroDivisionError" in failed["traceback"]
    assert (odd["level"], odd["message"]) == ("warning", "of %d")


# What Python takes apart at the very end may still write, as asyncio does of a task that is lost.
AT_THE_END = """
import sys
from ds_cp.log_stream import take_over

take_over("stderr")

class Late:
    stream = sys.stderr  # as a handler of logging holds it

    def __del__(self):
        self.stream.write("a last word\\n")

stays = sys.modules["stays"] = Late()
"""


def test_a_word_from_the_very_end_does_not_hold_up_the_process() -> None:
    """A thread that is started then never begins, and who starts it waits for that for ever."""
    run = [sys.executable, "-c", AT_THE_END]
    done = subprocess.run(run, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b"a last word\n", done


def test_a_word_from_the_very_end_waits_for_no_reader(pipe: Pipe) -> None:
    os.set_blocking(pipe[1], False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe[1], b"x" * 4096)
    os.set_blocking(pipe[1], True)
    process = subprocess.Popen([sys.executable, "-c", AT_THE_END], stderr=pipe[1])
    assert process.wait(60) == 0
