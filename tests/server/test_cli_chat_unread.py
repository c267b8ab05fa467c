"""``ds-cp chat`` whose stdout nobody reads."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.scripted import Scripted, scripted
from tests.server.conftest import wait_for

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
PIPE, PIECE = 4096, 1000  # bytes


@pytest.fixture
def there() -> Iterator[Scripted]:
    with scripted() as server:
        yield server


def unread(end: int) -> int:
    """Bytes in a pipe."""
    return int.from_bytes(fcntl.ioctl(end, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_ctrl_c_ends_what_nobody_reads(there: Scripted, flags: list[str]) -> None:
    """As before a pager that shows its first page."""
    left = threading.Event()

    def answer(h: Any, body: Any) -> None:
        h.begin()
        for _ in range(20):
            text = "x" * (PIECE - 1) + "\n"
            h.event({"id": "c", "choices": [{"delta": {"content": text}}]})
        if not flags:
            left.wait(PATIENCE_S)
        h.event({"id": "c", "choices": [{"delta": {}, "finish_reason": "stop"}]})
        h.event("[DONE]")

    there.answers["/v1/chat/completions"] = answer
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DS_CP_")}
    command = [sys.executable, "-m", "ds_cp.cli", "chat", "hi", "--url", there.url, *flags]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        os.close(theirs)
        assert wait_for(lambda: unread(ours) > PIPE - PIECE, PATIENCE_S)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, err) == (130, b"")
        read = os.read(ours, 1 << 20)
        assert len(read) <= PIPE
        assert flags or set(read) == set(b"x\n")
    finally:
        left.set()
        process.kill()
        os.close(ours)
