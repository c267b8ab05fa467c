"""``python attackers.py KIND URL [--share S]``: one kind of attacker, in a process of its own.

Prints "running" with its first connection, goes on until stdin ends, and then prints one JSON
object: how many requests it sent, connections it opened, and answers by status. What is measured
is to be the server and not the machine: an attacker runs at a low priority, and rests so that its
CPU time stays below the share ``S`` of the time that passes. The standard library alone, so
that it starts at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SHARE = 0.05  # of one core
BODY_BYTES = 8 * 2**20 - 4096  # just below what the server reads
CONNECTIONS = 1500  # that the idle ones try to hold
START_S = 60.0  # seconds for an attacker to begin, and to end, on a busy machine
HOLD_S = 4.0  # seconds that a client that does not read stays at least
OPENS_PER_S = 300  # new connections of one attacker
# A template with which a user's text makes rendering spin, or take 1.2 GB.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if 'spin' in m['content'] %}{% for a in range(90000) %}{% for b in range(90000) %}"
    "{% endfor %}{% endfor %}{% endif %}"
    "{% if 'grow' in m['content'] %}{{ m['role'] * 300000000 }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Attacker:
    """Opens connections and counts. The kinds are its methods; each is one of many tasks."""

    def __init__(self, url: str, share: float) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname or "", parts.port or 80)
        self.share = share
        self.began, self.used = time.monotonic(), time.process_time()
        self.counts: Counter[str] = Counter()
        self.next_open = 0.0

    async def rest(self) -> None:
        """Wait until the CPU time used is below the share."""
        used = time.process_time() - self.used
        ahead = used / self.share - (time.monotonic() - self.began)
        await asyncio.sleep(max(0.0, min(ahead, 5.0)))

    async def open(self, small: bool = False) -> socket.socket:
        """A new connection. ``small``: it takes in a few KB that it has not read."""
        await self.rest()
        now = time.monotonic()
        self.next_open = max(now, self.next_open) + 1 / OPENS_PER_S
        await asyncio.sleep(self.next_open - now)
        connection = socket.socket()
        try:
            connection.setblocking(False)
            if small:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            loop = asyncio.get_running_loop()
            await asyncio.wait_for(loop.sock_connect(connection, self.address), 10)
        except BaseException:
            connection.close()
            raise
        if not self.counts["opened"]:
            print("running", flush=True)
        self.counts["opened"] += 1
        return connection

    async def send(self, connection: socket.socket, data: bytes) -> None:
        """Send all of it, piece by piece."""
        loop = asyncio.get_running_loop()
        for at in range(0, len(data), 65536):
            await loop.sock_sendall(connection, data[at : at + 65536])
            await self.rest()
        self.counts["sent"] += 1

    async def read(self, connection: socket.socket) -> None:
        """Read the answer to its end, and count its status."""
        loop = asyncio.get_running_loop()
        seen = b""
        while data := await loop.sock_recv(connection, 65536):
            seen = seen or data[:16]
            await self.rest()
        self.counts[seen[9:12].decode("latin-1") or "closed"] += 1

    async def ask(self, path: str, body: bytes) -> None:
        """One whole exchange."""
        connection = await self.open()
        try:
            await self.send(connection, request(path, body))
            await self.read(connection)
        finally:
            connection.close()

    # --- the kinds

    async def bad_bodies(self, number: int) -> None:
        """8 MB of JSON whose elements are all wrong."""
        await self.ask(*worst(number % WORST))

    async def non_readers(self, number: int) -> None:
        """Answers that nobody reads: many pages in a row, a long one, a stream."""
        many = {"prompt": "a", "n": 64, "max_tokens": 100, "logprobs": 5, "ignore_eos": True}
        data = (
            PAGE * 1000,
            request(TEXT, dumped(many)),
            request(TEXT, dumped(many | {"n": 4, "max_tokens": 3000, "stream": True})),
        )[number % 3]
        connection = await self.open(small=True)
        try:
            await asyncio.get_running_loop().sock_sendall(connection, data)
            await self.hold(number)
        finally:
            connection.close()

    async def idle(self, number: int) -> None:
        """A connection that says nothing, half a head, or one request and no more."""
        parts = (b"", b"POST /v1/completions HTTP/1.1\r\nHost: local", GET)
        connection = await self.open()
        try:
            await asyncio.get_running_loop().sock_sendall(connection, parts[number % 3])
            await self.read(connection)
        finally:
            connection.close()

    async def tiny_chunks(self, number: int) -> None:
        """A body of chunks of one byte, every other one with a long extension."""
        extension = b";a=" + b"x" * 200 if number % 2 else b""
        chunks = (b"1" + extension + b"\r\n \r\n") * (65536 // (6 + len(extension)))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection = await self.open()
        try:
            await self.send(connection, head)
            for _ in range(4000):
                await self.send(connection, chunks)
        finally:
            connection.close()

    async def big_answers(self, number: int) -> None:
        """As many log-probabilities as the server gives, and fewer."""
        n, top = ((64, 20), (64, 5), (16, 5))[number % 3]
        body: dict[str, Any] = {"max_tokens": 100, "n": n, "ignore_eos": True}
        if number % 2:
            await self.ask(TEXT, dumped(body | {"prompt": "a", "logprobs": top}))
            return
        messages = [{"role": "user", "content": "a"}]
        logprobs = {"messages": messages, "logprobs": True, "top_logprobs": top}
        await self.ask(CHAT, dumped(body | logprobs))

    async def templates(self, number: int) -> None:
        """A user's text that makes the template spin or grow; long texts to tokenize and back."""
        await self.ask(*long(number % LONG))

    async def hold(self, number: int) -> None:
        """Hold a connection for a while without reading more than it takes in. A server that has
        closed it is not noticed: its last bytes wait for room that there never is."""
        await asyncio.sleep(HOLD_S + number % TASKS["non_readers"] / 2)


PAGE = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
# How many of each kind go on at once; they share the process and its share of a core.
TASKS = {
    "bad_bodies": 4,
    "non_readers": 24,
    "idle": CONNECTIONS,
    "tiny_chunks": 4,
    "big_answers": 3,
    "templates": 4,
}
KINDS = tuple(TASKS)
WORST, LONG = 8, 6  # bodies of worst() and of long()


def dumped(body: Any) -> bytes:
    return json.dumps(body).encode()


def request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def filled(template: bytes, item: bytes) -> bytes:
    """``template`` with as many of ``item`` in the place of @ as the size allows."""
    return template.replace(b"@", item * (BODY_BYTES // len(item)) + item.rstrip(b","))


@functools.cache
def worst(number: int) -> tuple[str, bytes]:
    """Bodies that cost the most to find wrong."""
    chat = b'{"messages":[{"role":"user","content":"a"}],'
    keys = b",".join(b'"temperatura%d":0' % i for i in range(BODY_BYTES // 24))
    return (
        (CHAT, filled(b'{"messages":[@]}', b"1,")),
        (CHAT, filled(b'{"messages":[@]}', b'{"rol":"a"},')),
        (TEXT, filled(b'{"prompt":"a","stop_token_ids":[@]}', b'"",')),
        (TEXT, filled(b'{"prompt":[@]}', b"[1],")),
        (TEXT, filled(b'{"prompt":"a","stop":[@]}', b"1,")),
        ("/detokenize", filled(b'{"tokens":[@]}', b'"",')),
        (CHAT, chat + keys + b"}"),
        (CHAT, b'{"messages":[{"role":"user","content":[' + b"[" * 4_000_000),
    )[number]


@functools.cache
def long(number: int) -> tuple[str, bytes]:
    """Texts that a template makes long, and long texts."""
    spin, grow = ([{"role": "user", "content": word}] for word in ("spin", "grow"))
    path, body = (
        (CHAT, {"messages": spin, "max_tokens": 1}),
        (CHAT, {"messages": grow, "max_tokens": 1}),
        ("/tokenize", {"messages": spin}),
        ("/tokenize", {"messages": grow}),
        ("/tokenize", {"prompt": "ab " * 2_000_000}),
        ("/detokenize", {"tokens": [9] * 2_000_000}),
    )[number]
    return path, dumped(body)


# --- the process, and how tests start it


async def attack(kind: str, url: str, share: float) -> None:
    for number in range(WORST) if kind == "bad_bodies" else ():
        worst(number)  # made before the clock runs
    for number in range(LONG) if kind == "templates" else ():
        long(number)
    attacker = Attacker(url, share)
    body = getattr(attacker, kind)

    async def again(number: int) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await body(number)
            number += TASKS[kind]
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(again(number)) for number in range(TASKS[kind])]
    over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=wait, daemon=True).start()
    await over.wait()
    used = {"tasks": len(tasks), "cpu_s": round(time.process_time() - attacker.used, 2)}
    print(json.dumps(dict(attacker.counts) | used), flush=True)
    os._exit(0)  # its connections end with it


@contextlib.contextmanager
def attackers(
    url: str, kinds: Sequence[str], share: float = SHARE
) -> Iterator[dict[str, dict[str, float]]]:
    """Attack with these kinds at once, a process each, until the block ends. What they did is in
    the result then."""
    did: dict[str, dict[str, float]] = {}
    script = str(Path(__file__).resolve())
    processes = {
        kind: subprocess.Popen(
            [sys.executable, script, kind, url, "--share", str(share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for kind in kinds
    }
    try:
        for kind, process in processes.items():
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_S)
            assert ready and process.stdout.readline() == b"running\n", f"{kind} did not start"
        yield did
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        for kind, process in processes.items():
            said, _ = process.communicate(timeout=START_S)
            did[kind] = json.loads(said)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("kind", choices=KINDS)
    arguments.add_argument("url")
    arguments.add_argument("--share", type=float, default=SHARE)
    args = arguments.parse_args()
    os.nice(10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    asyncio.run(attack(args.kind, args.url, args.share))


if __name__ == "__main__":
    main()
