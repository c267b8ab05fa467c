"""``python honest.py URL STREAMS``: honest clients beside an attack.

Prints "running" once every stream has had an event, goes on until stdin ends, and then prints one
JSON object with what they met (``tests.helpers.front.Honest``). The standard library alone, so that
it starts at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from urllib.parse import urlsplit

TOKENS = 100  # of one stream; another one follows

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


class Clients:
    def __init__(self, url: str, streams: int) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self.streams = streams
        self.begun = 0
        self.over = asyncio.Event()
        self.met = {"gap_s": 0.0, "first_s": 0.0, "whole": 0, "lost": 0, "why": ""}

    async def run(self) -> None:
        tasks = [asyncio.create_task(self._client(i)) for i in range(self.streams)]
        await self.over.wait()
        await asyncio.wait(tasks, timeout=30)
        self.met["lost"] += sum(not task.done() for task in tasks)
        print(json.dumps(self.met), flush=True)

    async def _client(self, index: int) -> None:
        first = True
        while not self.over.is_set():
            try:
                await self._stream(index, first)
                self.met["whole"] += 1
            except Exception as err:
                self.met["lost"] += 1
                self.met["why"] = self.met["why"] or f"{type(err).__name__}: {err}"
                await asyncio.sleep(0.2)
            first = False

    async def _stream(self, index: int, first: bool) -> None:
        body: dict[str, object] = {"stream": True}
        if index % 2:  # as most clients ask: without max_tokens, so that the model ends it
            path = CHAT
            body["messages"] = [{"role": "user", "content": f"honest {index}"}]
        else:
            path = TEXT
            body |= {"prompt": f"honest {index}", "max_tokens": TOKENS}
        data = json.dumps(body).encode()
        sent = time.monotonic()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(
                b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % (path.encode(), len(data))
                + data
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0]:
                raise RuntimeError(head.split(b"\r\n")[0].decode())
            last, done = 0.0, False
            while line := await reader.readline():
                if not line.startswith(b"data: "):
                    continue
                now = time.monotonic()
                if not last:
                    self.met["first_s"] = max(self.met["first_s"], now - sent)
                    if first:
                        self.begun += 1
                        if self.begun == self.streams:
                            print("running", flush=True)
                else:
                    self.met["gap_s"] = max(self.met["gap_s"], now - last)
                last = now
                if b'"error"' in line:
                    raise RuntimeError(line.decode()[:200])
                done = done or b"[DONE]" in line
            if not done:
                raise RuntimeError("cut off")
        finally:
            writer.close()


async def main() -> None:
    clients = Clients(sys.argv[1], int(sys.argv[2]))
    loop = asyncio.get_running_loop()

    def wait() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(clients.over.set)

    threading.Thread(target=wait, daemon=True).start()
    await clients.run()


if __name__ == "__main__":
    asyncio.run(main())
