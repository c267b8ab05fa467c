"""Answers as large as a request can ask for, many at once, half of them to clients that do not
read: honest streams go on, what is held is bounded, and the memory comes back."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.front import Front, front, honest_streams

pytestmark = pytest.mark.quiet

MIB = 2**20
LIMIT = 64 * MIB
SECONDS = 2.0  # of each attack
C, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "x"}]
# Each asks for 80,000 to 420,000 log-probabilities, or for 4 MB of text.
KINDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "new tokens": [
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 20, "n": 64}),
        (C, {"prompt": [5], "logprobs": 20, "n": 64}),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 20, "n": 64, "stream": True}),
    ],
    "prompts": [
        (C, {"prompt": [7] * 20_000, "logprobs": 20, "echo": True, "max_tokens": 0}),
        (
            C,
            {"prompt": [7] * 20_000, "logprobs": 20, "echo": True, "max_tokens": 0, "stream": True},
        ),
        (C, {"prompt": [7] * 5_800, "prompt_logprobs": 20, "n": 3, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 20_000}], "prompt_logprobs": 20}),
    ],
    "texts": [
        (C, {"prompt": [9] * 60_000, "echo": True, "n": 64, "max_tokens": 1}),
        (C, {"prompt": [9] * 60_000, "echo": True, "n": 64, "max_tokens": 1, "stream": True}),
        ("/tokenize", {"prompt": "a" * 100_000}),
        ("/detokenize", {"tokens": [9] * 60_000}),
    ],
}


class Attack:
    """Clients that ask again and again until ``over``; those with odd numbers do not read."""

    def __init__(self, attacked: Front, kinds: list[tuple[str, dict[str, Any]]]) -> None:
        self.port = attacked.port
        self.heads: list[bytes] = []
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self._run, args=(number, *kinds[number // 2 % len(kinds)]))
            for number in range(16)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int, path: str, body: dict[str, Any]) -> None:
        data = json.dumps({"max_tokens": 60} | body if path in (C, CHAT) else body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        while not self.over.is_set():
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.2) as sock:
                try:
                    sock.sendall(head.encode() + data)
                    self._receive(sock, read=number % 2 == 0)
                except OSError:
                    pass
            self.over.wait(0.1)

    def _receive(self, sock: socket.socket, read: bool) -> None:
        first = b""
        while not self.over.is_set():
            try:
                part = sock.recv(65536) if read or not first else b"."
            except TimeoutError:
                continue
            if not first:
                self.heads.append(part.partition(b"\r\n\r\n")[0])
            first = first or part
            if not part or not first.startswith(b"HTTP/1.1 200") or part.endswith(b"0\r\n\r\n"):
                return
            if not read:
                self.over.wait(0.2)

    def end(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(30)


def test_big_answers_do_not_hold_up_others(tmp_path: Path) -> None:
    """64 MiB may be held: large requests share three quarters, the others are told to come again;
    honest small ones are never refused."""
    engine = {"delay_s": 0.002, "max_model_len": 200_000}
    with front(tmp_path, max_buffered_bytes=LIMIT, engine=engine) as attacked:
        httpx.post(attacked.url + C, json={"prompt": [5], "logprobs": 5}, timeout=20)
        # The first chat starts the process for chat templates, which stays.
        httpx.post(attacked.url + CHAT, json={"messages": HELLO, "max_tokens": 1}, timeout=20)
        start = attacked.memory
        for kind, requests in KINDS.items():
            under_attack(attacked, kind, requests, start)
        assert "Traceback" not in attacked.log.read_text()


def under_attack(
    attacked: Front, kind: str, requests: list[tuple[str, dict[str, Any]]], start: int
) -> None:
    """``start``: bytes of the front before any attack."""
    longest, peak = 0.0, start
    with honest_streams(attacked.url, 5) as met:
        attack = Attack(attacked, requests)
        end = time.monotonic() + SECONDS
        while (begun := time.monotonic()) < end:
            assert httpx.get(attacked.url + "/health", timeout=20).status_code == 200
            longest = max(longest, time.monotonic() - begun)
            peak = max(peak, attacked.memory)
            time.sleep(0.05)
        attack.end()
    assert not met.lost, (kind, met.why)
    assert met.whole >= 5 and met.gap_s <= met.bound_s and longest <= met.bound_s, (
        kind,
        met,
        longest,
    )
    statuses = {head.split(b" ")[1] for head in attack.heads if head}
    assert b"200" in statuses and statuses <= {b"200", b"503"}, kind
    refused = [head.lower() for head in attack.heads if b" 503 " in head]
    assert all(b"\r\nretry-after: " in head for head in refused)
    # Beside what is counted: a tokenizer's own memory, and what the allocator keeps for a moment.
    assert peak < start + LIMIT + 150 * MIB, (kind, start, peak)
    end = time.monotonic() + 10
    while (after := attacked.memory) > start + 100 * MIB and time.monotonic() < end:
        time.sleep(0.2)
    assert after <= start + 100 * MIB, (kind, start, peak, after)
