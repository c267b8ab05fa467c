"""Responses that are kept, so that a later request can go on from them: bounded in number and in
bytes. Where room is needed, it is made by the key that holds most: its oldest responses go. So
each of k keys always has a k-th of the store, and one alone may have all of it."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_cp.api.answers.logprobs import CHAT_ENTRY_BYTES
from ds_cp.api.errors import ApiError
from ds_cp.api.responses.items import Item
from ds_cp.api.responses.request import ResponseRequest

OBJECT_BYTES = 256  # of memory that an object or a list takes beside its texts
CLOSE_S = 2.0  # seconds for what runs in the background to end with the server


@dataclass(eq=False)
class Said:
    """What one response adds to its conversation; ``before``: what the one before it added. It is
    kept as long as a response is that goes on from it. ``owner``: the digest of the API key that it
    belongs to; ``name``: its own in the journal, "" where it is in none."""

    items: Sequence[Item]
    before: Said | None = None
    owner: str | None = None
    name: str = ""
    holders: int = 0
    size: int = 0  # bytes
    whole: int = 0  # bytes, with those before
    count: int = field(init=False)  # items of the whole conversation; a response is one at least
    parts: int = field(init=False)  # texts in these items

    def __post_init__(self) -> None:
        count, parts = (0, 0) if self.before is None else (self.before.count, self.before.parts)
        self.count = count + max(len(self.items), 1)
        self.parts = parts + sum(len(item.get("content", ())) for item in self.items)

    def conversation(self) -> list[Item]:
        """All items, the first of the conversation first."""
        chain: list[Said] = []
        said: Said | None = self
        while said is not None:
            chain.append(said)
            said = said.before
        return [item for part in reversed(chain) for item in part.items]


@dataclass(eq=False)
class Kept:
    """One response. ``body``: the object of the protocol. ``input``: its request's items alone.
    ``task``: it still runs, in the background;
    ``asked``: with what, as long as it does."""

    body: dict[str, Any]
    input: Sequence[Item]
    said: Said
    size: int = 0  # bytes
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    asked: Asked | None = None


@dataclass(frozen=True)
class Asked:
    """What a response that runs in the background was asked with: the body, and its client for the
    engine. It is what a restart needs to go on."""

    body: ResponseRequest
    client: str


@dataclass
class _Share:
    """What one key has of the store: its responses, the oldest first, and their bytes."""

    names: OrderedDict[str, None] = field(default_factory=OrderedDict)
    size: int = 0


class StoreLog:
    """Is told of every change of a store; this one forgets it. ``commit`` ends what belongs
    together; ``lasts``: whether a restart has it again."""

    lasts = False

    def put(self, kept: Kept) -> None:
        """A response is kept, or in another state."""

    def drop(self, response_id: str) -> None:
        """It is not kept any more."""

    def hold(self, said: Said) -> None:
        """A part of a conversation is kept."""

    def release(self, said: Said) -> None:
        """It is not kept any more."""

    def commit(self) -> None:
        """What was told since the last time belongs together."""


class ResponseStore:
    """At most ``max_responses`` responses of ``max_bytes`` together; for the event loop alone.
    ``log`` is told of its changes."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.log = StoreLog()
        self._max = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the oldest first
        # Each as often as it is kept: a later response may have it again.
        self._items: dict[tuple[str | None, str], list[Item]] = {}
        self._shares: defaultdict[str | None, _Share] = defaultdict(_Share)  # by owner
        self.size = 0  # bytes

    def __len__(self) -> int:
        return len(self._kept)

    def all(self) -> list[Kept]:
        """What is kept, the oldest first."""
        return list(self._kept.values())

    def get(self, response_id: str, owner: str | None) -> Kept | None:
        """A response that was kept for ``owner`` and has not been dropped since."""
        kept = self._kept.get(response_id)
        return kept if kept is not None and kept.said.owner == owner else None

    def find(self, response_id: str, owner: str | None) -> Kept:
        """The same. Raises ``ApiError`` 404 where there is none."""
        kept = self.get(response_id, owner)
        if kept is None:
            raise ApiError(
                404,
                f"Response with id {response_id[:100]!r} not found. It was never stored, was "
                f"deleted, or made room for newer ones: at most {self._max} responses and "
                f"{self._max_bytes} bytes are kept (server.max_stored_responses, "
                "server.max_stored_response_bytes).",
                code="response_not_found",
            )
        return kept

    def item(self, item_id: str, owner: str | None) -> Item | None:
        """An item of any response that is kept for ``owner``."""
        found = self._items.get((owner, item_id))
        return found[0] if found else None

    def keep(self, kept: Kept) -> bool:
        """Keep a response, in the place of an earlier state of the same one; drop those that do
        not run until it fits: the oldest of the owner that has most. False where it is too large
        for that, beside what others have a right to, and is not kept."""
        found = self._keep(kept)
        self.log.commit()
        return found

    def _keep(self, kept: Kept) -> bool:
        response_id = kept.body["id"]
        self._drop(response_id)
        kept.size = size_of(kept.body, self._max_bytes, kept.body.get("output", ()))
        kept.size += OBJECT_BYTES
        if not kept.said.holders:
            self.measure(kept.said)
        need = kept.size + kept.said.whole
        owner = kept.said.owner
        others = sum(min(one.size, need) for key, one in self._shares.items() if key != owner)
        if self._max == 0 or need + others > self._max_bytes:
            return False
        self._kept[response_id] = kept
        self._shares[owner].names[response_id] = None
        self._grow(owner, kept.size)
        self._hold(kept.said)
        self.log.put(kept)
        self._make_room()
        return response_id in self._kept

    def measure(self, said: Said) -> None:
        """Set the sizes of what a response adds; those of what was before are known."""
        said.size = size_of(said.items, self._max_bytes, said.items)
        said.whole = said.size + (said.before.whole if said.before is not None else 0)

    def drop(self, response_id: str) -> None:
        """Forget a response, if it is kept."""
        self._drop(response_id)
        self.log.commit()

    def _drop(self, response_id: str) -> None:
        kept = self._kept.pop(response_id, None)
        if kept is not None:
            owner = kept.said.owner
            del self._shares[owner].names[response_id]
            self._grow(owner, -kept.size)
            self.log.drop(response_id)
            self._release(kept.said)
            if not self._shares[owner].names:
                del self._shares[owner]

    async def close(self) -> None:
        """Cancel what runs in the background, and wait ``CLOSE_S`` seconds for its end. For the
        log it still runs: a restart goes on with it."""
        self.log = StoreLog()
        tasks = [kept.task for kept in self._kept.values() if kept.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)

    def _make_room(self) -> None:
        while (many := len(self._kept) > self._max) or self.size > self._max_bytes:
            shares = self._shares.values()
            by_most = sorted(shares, key=lambda one: -len(one.names) if many else -one.size)
            oldest = next(filter(None, map(self._oldest_done, by_most)), None)
            if oldest is None:
                return
            self._drop(oldest)

    def _oldest_done(self, share: _Share) -> str | None:
        return next((name for name in share.names if self._kept[name].task is None), None)

    def _grow(self, owner: str | None, size: int) -> None:
        self.size += size
        self._shares[owner].size += size

    def _hold(self, said: Said) -> None:
        node: Said | None = said
        while node is not None:
            node.holders += 1
            if node.holders > 1:
                return
            self._grow(node.owner, node.size)
            self.log.hold(node)
            for item in node.items:
                self._items.setdefault((node.owner, item["id"]), []).append(item)
            node = node.before

    def _release(self, said: Said) -> None:
        node: Said | None = said
        while node is not None:
            node.holders -= 1
            if node.holders:
                return
            self._grow(node.owner, -node.size)
            self.log.release(node)
            for item in node.items:
                same = self._items[node.owner, item["id"]]
                same.pop()
                if not same:
                    del self._items[node.owner, item["id"]]
            node = node.before


def size_of(value: Any, most: int, items: Iterable[Item] = ()) -> int:
    """Bytes of memory that a value of JSON takes; some number above ``most`` for more than that.
    ``items``: those in it whose log-probabilities, which may be a million, are counted and not gone
    through."""
    counted = [
        part["logprobs"]
        for item in items
        if item["type"] == "message"
        for part in item["content"]
        if part.get("logprobs")
    ]
    total = sum(CHAT_ENTRY_BYTES * len(e) * (1 + len(e[0]["top_logprobs"])) for e in counted)
    skipped, todo = set(map(id, counted)), [value]
    while todo and total <= most:
        item = todo.pop()
        if isinstance(item, str):
            total += sys.getsizeof(item)
        elif isinstance(item, dict):
            total += OBJECT_BYTES
            todo += item.values()
        elif isinstance(item, list | tuple):
            total += OBJECT_BYTES
            todo += () if id(item) in skipped else item
        else:
            total += 32
    return total
