"""The keys and values by which the ranks of a job find each other, kept by rank 0's supervisor (or
by its only process): what torch calls a store, without torch."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

MAX_BYTES = 1 << 28  # of all keys and values together
MAX_WAIT_S = 1.0  # seconds that one request may wait for keys; who needs longer asks again

Operation = Literal[
    "set", "get", "check", "wait", "add", "compare_set", "append", "delete", "forget", "count"
]


class Request(msgspec.Struct, frozen=True, array_like=True):
    """``values``: one for each key to set or append; of ``compare_set`` the expected one and the
    new one. The ``keys`` of ``forget`` are how those begin that are to go. ``wait_s``: seconds to
    wait until all keys are there, for ``get`` and ``wait``."""

    operation: Operation
    keys: list[str] = []
    values: list[bytes] = []
    amount: int = 0
    wait_s: float = 0.0


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """``done``: whether all keys were there. ``error``: why nothing was done."""

    done: bool = True
    values: list[bytes] = []
    number: int = 0
    error: str = ""


class Values:
    """All runs in one event loop."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._bytes = 0
        self._changed = asyncio.Event()

    async def answer(self, request: Request) -> Reply:
        """Do one operation."""
        keys = request.keys
        if request.operation in ("get", "wait"):
            if not await self._wait(keys, min(request.wait_s, MAX_WAIT_S)):
                return Reply(done=False)
            got = request.operation == "get"
            return Reply(values=[self._values[key] for key in keys] if got else [])
        if request.operation == "check":
            return Reply(done=self._has(keys))
        if request.operation == "count":
            return Reply(number=len(self._values))
        if request.operation == "delete":
            return Reply(number=sum(self._drop(key) for key in keys))
        if request.operation == "forget":
            gone = [key for key in self._values if key.startswith(tuple(keys))]
            return Reply(number=sum(self._drop(key) for key in gone))
        return self._write(request)

    def _write(self, request: Request) -> Reply:
        keys, values = request.keys, request.values
        needed = {"add": 0, "compare_set": 2}.get(request.operation, len(keys))
        single = request.operation in ("add", "compare_set")
        if len(values) != needed or not keys or (single and len(keys) != 1):
            return Reply(error=f"{request.operation} of {len(keys)} keys, {len(values)} values")
        if self._bytes + sum(map(len, [*values, *map(str.encode, keys)])) > MAX_BYTES:
            return Reply(error=f"the store would hold more than {MAX_BYTES} bytes")
        if request.operation == "set":
            for key, value in zip(keys, values, strict=True):
                self._set(key, value)
        elif request.operation == "append":
            for key, value in zip(keys, values, strict=True):
                self._set(key, self._values.get(key, b"") + value)
        elif request.operation == "add":
            try:
                number = int(self._values.get(keys[0], b"0")) + request.amount
            except ValueError:
                return Reply(error=f"the value of {keys[0][:80]} is not a number")
            self._set(keys[0], str(number).encode())
            return Reply(number=number)
        else:
            return Reply(values=[self._compare_set(keys[0], *values)])
        return Reply()

    def _compare_set(self, key: str, expected: bytes, wanted: bytes) -> bytes:
        """As torch's stores do: a key that is missing is set where nothing was expected."""
        found = self._values.get(key)
        if found is None and expected:
            return expected
        if found is None or found == expected:
            self._set(key, wanted)
            return wanted
        return found

    def _set(self, key: str, value: bytes) -> None:
        self._drop(key)
        self._values[key] = value
        self._bytes += len(key.encode()) + len(value)
        self._changed.set()
        self._changed = asyncio.Event()

    def _drop(self, key: str) -> bool:
        value = self._values.pop(key, None)
        if value is not None:
            self._bytes -= len(key.encode()) + len(value)
        return value is not None

    def _has(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    async def _wait(self, keys: list[str], seconds: float) -> bool:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not self._has(keys):
            left = end - loop.time()
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return self._has(keys)
        return True
