"""A streamed completion of a real server, read in a thread, with the moments of its events."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
import urllib.request
from typing import Any

LIMIT_S = 300.0  # for a stream to end, on a busy machine


class Stream:
    """Text and tokens by answer. ``times``: of its events, in ``time.monotonic()``; ``errors``:
    what it met. ``ignore_eos`` unless ``body`` says otherwise. ``key``: the server's."""

    def __init__(self, url: str, body: dict[str, Any], *, key: str = "", **fields: Any) -> None:
        """``fields``: of this request beside ``body``."""
        self.body = body
        self.gives_up = False  # the client has left
        self._sock: socket.socket | None = None
        self.answers: dict[int, dict[str, Any]] = {}
        self.errors: list[Any] = []
        self.times: list[float] = []
        whole = {"model": "tiny", "stream": True, "ignore_eos": True, **body, **fields}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(whole).encode(),
            {"Content-Type": "application/json"} | headers,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=LIMIT_S) as answer:
                self._sock = socket.socket(fileno=os.dup(answer.fileno()))
                for line in answer:
                    if line.startswith(b"data: {"):
                        self._take(json.loads(line[6:]))
        except (OSError, http.client.HTTPException) as err:
            self.errors.append(err)
        finally:
            if self._sock is not None:
                self._sock.close()

    def leave(self) -> None:
        """The client goes away without a word."""
        self.gives_up = True
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.errors.append(event)
            return
        self.times.append(time.monotonic())
        for choice in event["choices"]:
            known = self.answers.setdefault(
                choice["index"], {"text": "", "tokens": [], "reason": None}
            )
            known["text"] += choice["text"]
            known["tokens"] += (choice.get("logprobs") or {}).get("tokens", [])
            known["reason"] = choice["finish_reason"] or known["reason"]

    @property
    def count(self) -> int:
        """Events so far."""
        return len(self.times)

    @property
    def longest(self) -> float:
        """Seconds between two events, at most."""
        times = list(self.times)
        return max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0)

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return not self._thread.is_alive()

    def end(self) -> dict[int, dict[str, Any]]:
        """Wait for its end; all its answers, whole."""
        self._thread.join(LIMIT_S)
        assert self.is_over and not self.errors, self.errors
        assert {one["reason"] for one in self.answers.values()} == {"length"}
        return self.answers
