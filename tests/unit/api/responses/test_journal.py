"""The store of responses, a journal, and the store after a restart."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from ds_cp.api.responses.items import output_text, text_item
from ds_cp.api.responses.journal import restore, synced
from ds_cp.api.responses.request import ResponseRequest
from ds_cp.api.responses.resource import new_response
from ds_cp.api.responses.store import Asked, Kept, ResponseStore, Said, StoreLog
from ds_cp.config import load_config
from ds_cp.journal.file import Change
from ds_cp.journal.format import Kind
from ds_cp.journal.journal import Journal

ASKED = {"input": "hi", "background": True, "text": {"format": {"type": "json_object"}}}


def opened(folder: Path) -> Journal:
    journal = Journal(str(folder / "x"), load_config({}, {"model": "m"}))
    journal.start(("model", "tokenizer"))
    return journal


def response(name: str, output: list[Any]) -> dict[str, Any]:
    body = new_response(ResponseRequest.model_validate({"input": "hi"}), name, "m")
    return body | {"status": "completed", "output": output}


def answer(text: str) -> dict[str, Any]:
    part = output_text(text, [{"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": []}])
    return text_item("assistant", "x") | {"content": [part]}


def kept_of(name: str, before: Said | None = None, owner: str | None = None) -> Kept:
    items, output = [text_item("user", f"{name}?")], [answer(f"{name}!")]
    return Kept(response(name, output), items, Said([*items, *output], before, owner))


def shown(store: ResponseStore) -> list[Any]:
    return [
        (kept.body, list(kept.input), kept.said.conversation(), kept.said.owner, kept.size)
        for kept in store.all()
    ]


def restarted(folder: Path, most: int = 100) -> tuple[ResponseStore, Journal, list[Kept]]:
    store, journal = ResponseStore(most, 1 << 20), opened(folder)
    return store, journal, restore(store, journal)


def test_a_store_after_a_restart(tmp_path: Path) -> None:
    """Random lives: kept, kept again in another state, deleted, pushed out, gone on from."""
    for seed in range(8):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rng = random.Random(seed)
        store, journal, _ = restarted(folder, 6)
        for n in range(40):
            there = store.all()
            if there and rng.random() < 0.25:
                store.drop(rng.choice(there).body["id"])
            elif there and rng.random() < 0.2:
                again = rng.choice(there)
                failed = again.body | {"status": "failed", "output": [answer("part")]}
                store.keep(Kept(failed, again.input, again.said))
            else:
                before = rng.choice(there).said if there and rng.random() < 0.6 else None
                owner = before.owner if before else rng.choice([None, "key"])
                store.keep(kept_of(f"resp_{n}", before, owner))
            if rng.random() < 0.1:
                before_stop = shown(store)
                journal.close()
                store, journal, running = restarted(folder, 6)
                assert shown(store) == before_stop and not running
        size = store.size
        expected = shown(store)
        journal.close()
        store, journal, _ = restarted(folder, 6)
        assert shown(store) == expected and store.size == size
        for kept in store.all():
            store.drop(kept.body["id"])
        journal.close()
        journal = opened(folder)
        assert journal.stored == {} and store.size == 0
        journal.close()


def test_a_smaller_store_drops_the_oldest(tmp_path: Path) -> None:
    store, journal, _ = restarted(tmp_path)
    for n in range(5):
        store.keep(kept_of(f"resp_{n}"))
    journal.close()
    store, journal, _ = restarted(tmp_path, 2)
    assert [kept.body["id"] for kept in store.all()] == ["resp_3", "resp_4"]
    journal.close()
    store, journal, _ = restarted(tmp_path)
    assert [kept.body["id"] for kept in store.all()] == ["resp_3", "resp_4"]
    journal.close()


def test_what_ran_is_found_running(tmp_path: Path) -> None:
    store, journal, _ = restarted(tmp_path)
    body = ResponseRequest.model_validate(ASKED)
    kept = Kept(response("resp_1", []) | {"status": "in_progress"}, body.input or [],
                Said(body.input or [], None, "key"), asked=Asked(body, "key key"))  # fmt: skip
    store.keep(kept)
    store.log.commit()
    journal.close()
    store, journal, running = restarted(tmp_path)
    (found,) = running
    assert found.asked is not None and found.asked.client == "key key"
    asked = found.asked.body
    assert asked.model_dump(exclude={"input"}) == body.model_dump(exclude={"input"})
    assert asked.constraint == body.constraint is not None
    assert list(found.input) == body.input and found.said.owner == "key"
    # Once it is over, a restart does not run it again.
    store.keep(kept_of("resp_1", owner="key"))
    journal.close()
    store, journal, running = restarted(tmp_path)
    assert not running and store.all()[0].body["status"] == "completed"
    journal.close()


def test_records_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    store, journal, _ = restarted(tmp_path)
    store.keep(kept_of("resp_1"))
    journal.submit([Change(Kind.PUT, "response:resp_2", b"\xc1"), Change(Kind.PUT, "said:y", b"")])
    journal.close()
    store, journal, _ = restarted(tmp_path)
    assert [kept.body["id"] for kept in store.all()] == ["resp_1"]
    journal.close()
    journal = opened(tmp_path)
    assert len(journal.stored) == 2  # the response and what it said
    journal.close()


def test_an_answer_waits_for_the_disk(tmp_path: Path) -> None:
    store, journal, _ = restarted(tmp_path)
    store.keep(kept_of("resp_1"))

    async def wait() -> None:
        await asyncio.wait_for(synced(journal), 60)
        await asyncio.wait_for(synced(None), 60)

    asyncio.run(wait())
    assert journal.stats().syncs >= 1
    journal.close()
    asyncio.run(wait())  # nobody will write it: nobody waits
    assert isinstance(ResponseStore(1, 1).log, StoreLog)
