"""The store of responses: what is kept, what makes room, and what a conversation is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ds_cp.api.errors import ApiError
from ds_cp.api.responses.items import text_item
from ds_cp.api.responses.store import Kept, ResponseStore, Said, size_of


def kept(name: str, text: str = "", before: Kept | None = None, owner: str | None = None) -> Kept:
    item = text_item("user", text or name)
    said = Said([item], None if before is None else before.said, owner)
    return Kept({"id": name}, [item], said)


def texts(entry: Kept) -> list[str]:
    return [item["content"][0]["text"] for item in entry.said.conversation()]


def test_a_conversation_outlives_its_first_responses() -> None:
    store = ResponseStore(2, 1 << 20)
    a = kept("a")
    b = kept("b", before=a)
    c = kept("c", before=b)
    for entry in (a, b, c):
        assert store.keep(entry)
    assert store.get("a", None) is None and len(store) == 2
    assert texts(store.find("c", None)) == ["a", "b", "c"]
    assert store.item(a.input[0]["id"], None) is a.input[0]  # the conversation has it
    store.drop("b")
    assert texts(store.find("c", None)) == ["a", "b", "c"]
    store.drop("c")
    assert store.size == 0 and len(store) == 0
    assert store.item(a.input[0]["id"], None) is None


def test_a_key_sees_its_own() -> None:
    store = ResponseStore(9, 1 << 20)
    entry = kept("a", owner="k")
    store.keep(entry)
    assert store.find("a", "k") is entry
    for other in (None, "l"):
        with pytest.raises(ApiError, match="max_stored_responses") as caught:
            store.find("a", other)
        assert caught.value.status_code == 404
        assert store.item(entry.input[0]["id"], other) is None
    assert store.item(entry.input[0]["id"], "k") is entry.input[0]


def test_what_is_too_large_is_not_kept_and_drives_nothing_out() -> None:
    store = ResponseStore(9, 8000)
    small = kept("small")
    assert store.keep(small) and not store.keep(kept("large", "x" * 8000))
    assert store.find("small", None) is small
    long = kept("long", "x" * 3000)
    assert store.keep(long)
    assert not store.keep(kept("longer", "x" * 2500, before=long))  # with what is before it
    assert store.find("small", None) is small and store.find("long", None) is long
    assert not ResponseStore(0, 8000).keep(kept("a"))


def test_what_runs_stays() -> None:
    async def check() -> None:
        store = ResponseStore(1, 1 << 20)
        running = kept("running")
        running.task = asyncio.create_task(asyncio.sleep(60))
        assert store.keep(running)
        assert not store.keep(kept("b"))  # the newest has no room
        assert store.find("running", None) is running
        await store.close()
        assert running.task.cancelled()

    asyncio.run(check())


def test_a_key_makes_room_for_itself() -> None:
    store = ResponseStore(4, 1 << 20)
    own = kept("mine", owner="k")
    assert store.keep(own)
    for number in range(9):
        assert store.keep(kept(f"r{number}", owner="l"))
    assert store.find("mine", "k") is own and len(store) == 4
    assert [store.get(f"r{n}", "l") is not None for n in range(9)] == [False] * 6 + [True] * 3
    later = [kept(f"k{number}", owner="k") for number in range(3)]
    assert all(map(store.keep, later))  # until both have as many
    assert [store.get(e.body["id"], "k") is not None for e in (own, *later)] == [False] * 2 + [
        True
    ] * 2
    assert store.get("r7", "l") and store.get("r8", "l")


def test_the_bytes_of_a_key_are_no_others() -> None:
    store = ResponseStore(99, 20_000)
    small = kept("small", "x" * 2000, owner="k")
    assert store.keep(small)
    for number in range(20):
        assert store.keep(kept(f"r{number}", "x" * 2000, owner="l"))
    before = len(store)
    assert store.find("small", "k") is small and before > 3
    assert not store.keep(kept("large", "x" * 16_000, owner="l"))  # not beside the other's
    assert len(store) == before and store.size <= 20_000
    half = kept("half", "x" * 2500, owner="k")
    assert store.keep(half) and store.find("small", "k") is small  # the other had more
    for name in [f"r{n}" for n in range(20)]:
        store.drop(name)
    assert store.keep(kept("all", "x" * 14_000, owner="k"))  # alone, a key has all of it
    for name in ("small", "half", "all"):
        store.drop(name)
    assert store.size == 0 and not store._shares


class StoreMachine(RuleBasedStateMachine):
    """Against a plain list: the newest that fit are kept, and each conversation is whole."""

    @initialize(most=st.integers(1, 4), size=st.integers(2000, 9000))
    def begin(self, most: int, size: int) -> None:
        self.store = ResponseStore(most, size)
        self.most, self.bytes = most, size
        self.all: list[tuple[Kept, list[str]]] = []

    @rule(data=st.data(), text=st.text("ab€", max_size=400))
    def add(self, data: st.DataObject, text: str) -> None:
        there = [entry for entry in self.all if self.store.get(entry[0].body["id"], None)]
        before: Any = data.draw(st.sampled_from([None, *there])) if there else None
        name = f"r{len(self.all)}"
        entry = kept(name, f"{name}:{text}", before and before[0])
        said = [*(before[1] if before else []), f"{name}:{text}"]
        if self.store.keep(entry):
            self.all.append((entry, said))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.all:
            self.store.drop(data.draw(st.sampled_from(self.all))[0].body["id"])

    @invariant()
    def ledger_balances(self) -> None:
        if not hasattr(self, "store"):
            return
        there = [e for e, _ in self.all if self.store.get(e.body["id"], None)]
        assert len(there) == len(self.store) <= self.most
        nodes: dict[int, Said] = {}
        for entry in there:
            node: Said | None = entry.said
            while node is not None:
                nodes[id(node)] = node
                node = node.before
        size = sum(e.size for e in there) + sum(size_of(n.items, 1 << 30) for n in nodes.values())
        assert self.store.size == size <= self.bytes
        for entry, said in self.all:
            if self.store.get(entry.body["id"], None) is not None:
                assert texts(entry) == said
        kept_items = {item["id"] for node in nodes.values() for item in node.items}
        for entry, _ in self.all:
            item = entry.input[0]
            assert (self.store.item(item["id"], None) is item) == (item["id"] in kept_items)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
