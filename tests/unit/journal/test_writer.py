"""The thread that writes: groups, order, a disk that fails and comes back, room that ends."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ds_cp.journal import writer as writing
from ds_cp.journal.file import Change, JournalFile, new_header, read_journal
from ds_cp.journal.format import Kind
from ds_cp.journal.place import Place
from ds_cp.journal.writer import Writer

PATIENCE_S = 60.0


class Journal:
    def __init__(self, folder: Path, max_bytes: int = 1 << 30) -> None:
        self.place = Place(str(folder / "x"))
        self.file = JournalFile(self.place, None, new_header("c", (), ""))
        self.writer = Writer(self.file, max_bytes)

    def synced(self) -> bool:
        done, said = threading.Event(), []

        def tell(written: bool) -> None:
            said.append(written)
            done.set()

        self.writer.when_synced(tell)
        assert done.wait(PATIENCE_S)
        return said[0]

    def held(self) -> dict[str, bytes]:
        found = read_journal(self.place)
        assert found is not None and not found.notes()
        return {key: b"".join(entry.data) for key, entry in found.entries.items()}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(writing, "say", lines.append)
    return lines


def put(key: str, data: bytes = b"0") -> Change:
    return Change(Kind.PUT, key, data)


def add(key: str, data: bytes) -> Change:
    return Change(Kind.ADD, key, data)


def test_many_threads_one_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def write(name: str) -> None:
        journal.writer.submit([put(name, bytes(1))])
        for n in range(1, 200):
            journal.writer.submit([add(name, bytes([n]))])

    threads = [threading.Thread(target=write, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.synced()
    assert journal.held() == {str(n): bytes(range(200)) for n in range(4)}
    stats = journal.writer.stats()
    assert stats.records == 800 and stats.syncs < 800 and stats.working and not stats.lost
    assert stats.bytes <= stats.size == journal.place.file.stat().st_size
    journal.writer.close()


def test_what_was_submitted_is_written_at_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.writer.submit([put("a"), Change(Kind.ADD, "a", lambda: b"late", 4)])
    journal.writer.close()
    assert journal.held() == {"a": b"0late"}
    journal.writer.submit([put("b")])  # too late: nothing happens
    assert not journal.synced()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_disk_that_fails_and_comes_back(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Nothing raises; one warning; deletions are made up for, and keys that lost something keep
    what they had, until they begin anew."""
    monkeypatch.setattr(writing, "RETRY_S", 0.05)
    journal = Journal(tmp_path)
    journal.writer.submit([put("a"), put("b"), put("gone")])
    assert journal.synced()
    real: Any = getattr(os, call)
    broken = threading.Event()
    broken.set()

    def fail(*args: Any) -> Any:
        if broken.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    def no_room(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    real_rewrite = journal.file.rewrite
    monkeypatch.setattr(journal.file, "rewrite", lambda: no_room() if broken.is_set()
                        else real_rewrite())  # fmt: skip
    journal.writer.submit([add("a", b"lost")])
    assert not journal.synced()
    assert not journal.writer.stats().working
    journal.writer.submit([add("b", b"lost"), Change(Kind.DROP, "gone"), put("new")])
    assert not journal.synced()
    broken.clear()
    for _ in range(int(PATIENCE_S / 0.02)):
        if journal.writer.stats().working:
            break
        threading.Event().wait(0.02)
    journal.writer.submit([add("a", b"!"), add("new", b"!"), put("b", b"again"), add("b", b"!")])
    assert journal.synced()
    assert journal.held() == {"a": b"0", "b": b"again!"}
    warning, news = said
    assert "requests go on" in warning and "No space left" in warning and "again" in news
    assert journal.writer.stats().lost >= 3
    journal.writer.close()


def test_no_room_by_its_own_bound(tmp_path: Path, said: list[str]) -> None:
    journal = Journal(tmp_path, max_bytes=5000)
    journal.writer.submit([put("a", bytes(3000))])
    assert journal.synced()
    for name in "bcd":
        journal.writer.submit([put(name, bytes(3000)), add("a", b"x")])
        assert journal.synced()
    assert list(journal.held()) == ["a"] and len(said) == 1 and "journal_max_bytes" in said[0]
    assert journal.writer.stats().working
    journal.writer.submit([Change(Kind.DROP, "a"), put("e", bytes(3000))])
    assert journal.synced()
    journal.writer.submit([put("f", bytes(3000))])
    assert journal.synced()
    assert list(journal.held()) == ["f"]
    journal.writer.close()


def test_the_file_stays_small(tmp_path: Path) -> None:
    """What is dropped is rewritten away."""
    journal = Journal(tmp_path)
    journal.writer.submit([put("kept", b"k")])
    for n in range(60):
        journal.writer.submit([put(str(n), bytes(1 << 20))])
        journal.writer.submit([Change(Kind.DROP, str(n))])
        assert journal.synced()
    journal.writer._rewrite_at = 0.0
    journal.writer.submit([add("kept", b"!")])
    assert journal.synced() and journal.held() == {"kept": b"k!"}
    assert journal.place.file.stat().st_size < 1 << 20
    journal.writer.close()


def test_what_cannot_be_encoded_is_lost_alone(tmp_path: Path, said: list[str]) -> None:
    def fail() -> bytes:
        raise KeyError("x")

    journal = Journal(tmp_path)
    journal.writer.submit([put("a"), Change(Kind.PUT, "b", fail)])
    journal.writer.submit([put("c")])
    assert journal.synced() and journal.held() == {"c": b"0"}
    assert len(said) == 1 and journal.writer.stats().working
    journal.writer.close()
