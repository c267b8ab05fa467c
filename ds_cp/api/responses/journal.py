"""The store of responses in the journal: each change is written, and a restart has it again."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import ValidationError

from ds_cp.api.responses.request import ResponseRequest
from ds_cp.api.responses.resource import Pieces
from ds_cp.api.responses.store import Asked, Kept, ResponseStore, Said, StoreLog
from ds_cp.journal.file import Change
from ds_cp.journal.format import Kind
from ds_cp.journal.journal import Journal
from ds_cp.journal.responses import (
    BACKGROUND,
    RESPONSE,
    SAID,
    ResponseRecord,
    SaidRecord,
    decode_record,
    encode_record,
)

SYNC_S = 1.0  # seconds that an answer which promises something waits for the disk


class StoreJournal(StoreLog):
    """Writes what it is told. Responses are encoded by the journal's thread: they may be large."""

    lasts = True

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._changes: list[Change] = []

    def put(self, kept: Kept) -> None:
        """A response, and its request where it runs; one that does not has no tokens to come."""
        response_id = kept.body["id"]
        encode = partial(_response, kept.body, kept.said, len(kept.input), kept.asked)
        self._changes.append(Change(Kind.PUT, RESPONSE + response_id, encode, kept.size))
        if kept.asked is None:
            self._changes += self._journal.requests.forget(BACKGROUND + response_id)

    def drop(self, response_id: str) -> None:
        """It goes, with what is known of its tokens."""
        self._changes.append(Change(Kind.DROP, RESPONSE + response_id))

    def hold(self, said: Said) -> None:
        """Its items, and the name of what was before."""
        _named(said)
        before = None if said.before is None else _named(said.before)
        encode = partial(_said, said.items, before, said.owner)
        self._changes.append(Change(Kind.PUT, SAID + said.name, encode, said.size))

    def release(self, said: Said) -> None:
        """Nothing needs it any more."""
        self._changes.append(Change(Kind.DROP, SAID + said.name))

    def commit(self) -> None:
        """Write it, together."""
        changes, self._changes = self._changes, []
        if changes:
            self._journal.submit(changes)


async def synced(journal: Journal | None) -> None:
    """Wait until what was done is on the disk, ``SYNC_S`` seconds at most: a disk that is slow or
    full does not hold up an answer."""
    if journal is None:
        return
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def tell(_: bool) -> None:
        loop.call_soon_threadsafe(done.set)

    journal.when_synced(tell)
    try:
        await asyncio.wait_for(done.wait(), SYNC_S)
    except asyncio.TimeoutError:
        return


def restore(store: ResponseStore, journal: Journal) -> list[Kept]:
    """Keep again what the journal has, the oldest first, and write what the store does from now on.
    Returns those that were running. What is there and cannot be kept is dropped."""
    entries = {key: data[-1] for key, data in journal.stored.items() if data}
    journal.stored = {}
    records: dict[str, Any] = {}
    for key, data in entries.items():
        try:
            records[key] = decode_record(data)
        except ValueError:  # of a version that wrote other records
            continue
    saids = _saids(store, {k: r for k, r in records.items() if isinstance(r, SaidRecord)})
    for key, record in records.items():
        if isinstance(record, ResponseRecord) and record.said in saids:
            kept = _kept(record, saids[record.said])
            if kept is not None and RESPONSE + str(kept.body.get("id")) == key:
                store.keep(kept)
    held = {SAID + name for name, said in saids.items() if said.holders}
    there = {RESPONSE + kept.body["id"] for kept in store.all()}
    lost = [Change(Kind.DROP, key) for key in entries if key not in held | there]
    running = [kept for kept in store.all() if kept.asked is not None]
    wanted = {BACKGROUND + kept.body["id"] for kept in running}
    for group in journal.requests.groups:
        if group.startswith(BACKGROUND) and group not in wanted:
            lost += journal.requests.forget(group)
    journal.submit(lost)
    store.log = StoreJournal(journal)
    return running


def _named(said: Said) -> str:
    said.name = said.name or uuid.uuid4().hex
    return said.name


def _said(items: Sequence[Any], before: str | None, owner: str | None) -> bytes:
    return encode_record(SaidRecord(b"".join(Pieces().of_items(items)), before, owner))


def _response(body: Mapping[str, Any], said: Said, inputs: int, asked: Asked | None) -> bytes:
    output, added = body["output"], said.items[inputs:]
    whole = len(output) != len(added) or any(a is not b for a, b in zip(output, added, strict=True))
    shown = dict(body) if whole else dict(body) | {"output": []}
    request = None
    if asked is not None:
        request = asked.body.model_dump_json(exclude_unset=True).encode()
    return encode_record(
        ResponseRecord(
            b"".join(Pieces().of_response(shown)), said.name, inputs, whole, request,
            asked.client if asked else "",
        )
    )  # fmt: skip


def _saids(store: ResponseStore, records: Mapping[str, SaidRecord]) -> dict[str, Said]:
    """By name; without those whose beginning is lost."""
    found: dict[str, Said] = {}
    for key in records:
        chain = []
        name: str | None = key.removeprefix(SAID)
        while name is not None and name not in found and SAID + name in records:
            chain.append(name)
            name = records[SAID + name].before
        if name is not None and name not in found:
            continue
        before = None if name is None else found[name]
        for name in reversed(chain):
            record = records[SAID + name]
            before = found[name] = Said(json.loads(record.items), before, record.owner, name=name)
            store.measure(before)
    return found


def _kept(record: ResponseRecord, said: Said) -> Kept | None:
    body = json.loads(record.body)
    if not record.whole:
        body["output"] = list(said.items[record.inputs :])
    asked = None
    if record.asked is not None:
        try:
            request = ResponseRequest.model_validate_json(record.asked)
        except ValidationError:  # of a version that took other fields
            return None
        asked = Asked(request, record.client)
    return Kept(body, said.items[: record.inputs], said, asked=asked)
