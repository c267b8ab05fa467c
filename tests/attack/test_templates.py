"""A chat template that loops, allocates, recurses or writes without end costs one request."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.helpers.chat_templates import TRAPS
from tests.helpers.front import Front, front, honest_streams

pytestmark = pytest.mark.quiet

CHAT = "/v1/chat/completions"
MB = 1 << 20


def ask(attacked: Front, text: str) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return httpx.post(attacked.url + CHAT, json=body, timeout=60.0)


@contextmanager
def watched(attacked: Front) -> Iterator[list[int]]:
    """The memory of the front while the block runs, again and again."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            try:
                seen.append(attacked.memory)
            except Exception:  # a process ended while it was looked at
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_a_template_without_end_costs_one_request(tmp_path: Path) -> None:
    engine = {"delay_s": 0.02, "chat_template": TRAPS, "template_cpu_s": 0.3}
    with front(tmp_path, engine=engine, tokenize_timeout_s=50) as attacked:
        assert ask(attacked, "hello").status_code == 200
        before = attacked.memory
        traps = ["loop", "memory", "recurse", "huge", "divide", "loop"]
        with honest_streams(attacked.url, 5) as met, watched(attacked) as memory:
            with ThreadPoolExecutor(len(traps)) as pool:
                answers = [pool.submit(ask, attacked, trap) for trap in traps]
                time.sleep(0.1)
                honest = [ask(attacked, "hello") for _ in range(5)]
                refusals = [answer.result() for answer in answers]
        assert [reply.status_code for reply in honest] == [200] * 5
        for reply in refusals:
            assert reply.status_code == 400, reply.text
            assert "chat template" in reply.json()["error"]["message"]
        assert max(memory) < before + 400 * MB  # three workers at most, of 64 MiB and their own
        assert attacked.memory < before + 100 * MB
    assert met.whole >= 5 and not met.lost, met.why
    assert met.gap_s <= met.bound_s


def test_long_texts_are_not_in_the_way_of_short_ones(tmp_path: Path) -> None:
    """Texts of millions of characters, each a second of work, beside short ones."""
    with front(tmp_path, engine={"delay_s": 0.02, "max_model_len": 100_000}) as attacked:
        url = attacked.url + "/tokenize"
        assert httpx.post(url, json={"prompt": "x"}, timeout=20.0).status_code == 200
        before = attacked.memory
        long = "0123 " * 640_000  # most of them one token a character

        def send(_: int) -> httpx.Response:
            return httpx.post(url, json={"prompt": long}, timeout=60.0)

        with honest_streams(attacked.url, 5) as met, watched(attacked) as memory:
            with ThreadPoolExecutor(5) as pool:
                answers = [pool.submit(send, i) for i in range(5)]
                waits = []
                while not all(answer.done() for answer in answers):
                    begun = time.monotonic()
                    assert httpx.post(url, json={"prompt": "hello"}, timeout=20.0).is_success
                    waits.append(time.monotonic() - begun)
        for reply in (answer.result() for answer in answers):
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
        assert sorted(waits)[len(waits) // 2] < 0.5
        assert max(memory) < before + 300 * MB
    assert met.whole >= 5 and not met.lost, met.why
    assert met.gap_s <= met.bound_s
