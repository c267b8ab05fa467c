"""Whatever happens to the bytes of a journal: what is read is, for every key, the beginning of what
was written to it; only a header that is not whole is an error, a typed one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.journal.file import Change, JournalFile, new_header, read_journal
from ds_cp.journal.format import FRAME_BYTES, MARK, Kind, NotAJournalError, encode_header
from ds_cp.journal.place import NAME, Place
from ds_cp.journal.replay import replay

KEYS = ["a", "b", "request:c/0"]
Written = list[list[Change]]  # groups, each a frame

_changes = st.builds(
    Change, st.sampled_from(list(Kind)), st.sampled_from(KEYS), st.binary(max_size=40)
)
_groups = st.lists(st.lists(_changes, min_size=1, max_size=4), min_size=1, max_size=12)


class States:
    """A second opinion, by plain lists: what each key held after each group that wrote something,
    and in each of its lives."""

    def __init__(self, groups: Written) -> None:
        self.now: dict[str, list[bytes]] = {}
        self.after: list[dict[str, list[bytes]]] = [{}]
        self.lives: dict[str, list[list[bytes]]] = {key: [] for key in KEYS}
        for group in groups:
            wrote = [self._take(kind, key, data) for kind, key, data, _ in group]
            if not any(wrote):
                continue
            self.after.append({key: list(held) for key, held in self.now.items()})

    def _take(self, kind: Kind, key: str, data: Any) -> bool:
        if kind is Kind.PUT:
            self.now[key] = [data]
            self.lives[key].append(self.now[key])
            return True
        if kind is Kind.DROP:
            return self.now.pop(key, None) is not None
        if key in self.now:
            self.now[key].append(data)
        return key in self.now

    def is_beginning(self, key: str, data: Sequence[bytes]) -> bool:
        return any(life[: len(data)] == list(data) for life in self.lives[key])


def written(place: Place, groups: Written) -> bytes:
    file = JournalFile(place, None, new_header("config", ("model",), "tokenizer"))
    for group in groups:
        file.append([group])
    file.close()
    return place.file.read_bytes()


def held(raw: bytes) -> dict[str, list[bytes]]:
    found = replay(io.BytesIO(raw), len(raw))
    return {key: entry.data for key, entry in found.entries.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(str(tmp_path_factory.mktemp("journal") / "place"))


@settings(deadline=None, max_examples=30)
@given(groups=_groups)
def test_what_is_cut_is_the_end(place: Place, groups: Written) -> None:
    """A file that ends anywhere holds exactly the groups that are whole."""
    raw, states = written(place, groups), States(groups)
    begin = replay(io.BytesIO(raw), len(raw)).header
    first = len(encode_header(begin))
    assert held(raw) == states.now
    seen = set()
    for end in range(first, len(raw) + 1):
        found = replay(io.BytesIO(raw[:end]), end)
        data = {key: entry.data for key, entry in found.entries.items()}
        assert data == states.after[_frames_before(raw, first, end)]
        assert found.end + found.torn == end and not found.holes and not found.cut
        assert bool(found.notes()) == bool(found.torn)
        seen.add(found.frames)
    assert len(seen) >= 1
    for end in range(first):
        with pytest.raises(NotAJournalError):
            held(raw[:end])


def _frames_before(raw: bytes, first: int, end: int) -> int:
    """Groups that are whole before ``end``, by the sizes in the frames alone."""
    count, at = 0, first
    while at < len(raw):
        at += FRAME_BYTES + int.from_bytes(raw[at + 4 : at + 8], "little")
        if at > end:
            return count
        count += 1
    return count


@settings(deadline=None, max_examples=20)
@given(groups=_groups, data=st.data())
def test_what_is_damaged_is_no_record(place: Place, groups: Written, data: st.DataObject) -> None:
    """A byte that is changed anywhere, a stretch that is zeroed, taken out or doubled."""
    raw, states = written(place, groups), States(groups)
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << data.draw(st.integers(0, 7)) if at % 97 == 0 else 0xFF
        _check(bytes(flipped), states)
    for _ in range(20):
        a = data.draw(st.integers(0, len(raw)))
        b = data.draw(st.integers(a, len(raw)))
        for worse in (raw[:a] + bytes(b - a) + raw[b:], raw[:a] + raw[b:], raw[:b] + raw[a:]):
            _check(worse, states)


def _check(raw: bytes, states: States) -> None:
    try:
        found = held(raw)
    except NotAJournalError as err:
        assert "\n" not in str(err)
        return
    for key, data in found.items():
        assert states.is_beginning(key, data), (key, data, states.lives[key])


def test_what_follows_damage_is_kept(place: Place) -> None:
    """One frame of many is lost: every key that it had nothing of is whole, the one that it added
    to has its beginning, and all of it is said."""
    groups = [[Change(Kind.PUT, key, b"0")] for key in KEYS]
    groups += [[Change(Kind.ADD, key, bytes([n]))] for n in range(1, 5) for key in KEYS]
    raw = bytearray(written(place, groups))
    at = -1
    for _ in range(3 + 3 * 2 + 1):  # the third addition to the first key
        at = raw.index(MARK, at + 1)
    raw[at + 20] ^= 1
    found = replay(io.BytesIO(raw), len(raw))
    data = {key: b"".join(entry.data) for key, entry in found.entries.items()}
    assert data == {"a": b"0\1\2", "b": b"0\1\2\3\4", "request:c/0": b"0\1\2\3\4"}
    assert [frames for _, _, frames in found.holes] == [1] and found.cut == {"a"}
    lost, cut = found.notes()
    assert "1 records in them are lost" in lost and cut == "only a beginning is left of a"
    # A writer that goes on has a file without the damage.
    place.file.write_bytes(raw)
    again = read_journal(place)
    assert again is not None
    file = JournalFile(place, again, again.header)
    file.append([[Change(Kind.ADD, "a", b"!")]])
    file.close()
    healed = read_journal(place)
    assert healed is not None and not healed.notes()
    assert b"".join(healed.entries["a"].data) == b"0\1\2!"


def test_a_client_cannot_write_a_frame(place: Place, tmp_path: Path) -> None:
    """Bytes of another journal in a text are no frame of this one, wherever reading begins."""
    other = Place(str(tmp_path / "other"))
    forged = written(other, [[Change(Kind.PUT, "forged", b"x")]])
    raw = bytearray(written(place, [[Change(Kind.PUT, "a", forged)], [Change(Kind.PUT, "b", b"")]]))
    raw[raw.index(MARK) + 20] ^= 1  # so that what is inside is looked at
    assert held(bytes(raw)) == {"b": [b""]}


def test_a_key_that_was_dropped_begins_anew(place: Place) -> None:
    """A lost deletion and a lost beginning between: what follows is not added to the old life."""
    groups = [
        [Change(Kind.PUT, "a", b"old")],
        [Change(Kind.DROP, "a"), Change(Kind.PUT, "a", b"new")],
        [Change(Kind.ADD, "a", b"more")],
    ]
    raw = bytearray(written(place, groups))
    assert held(bytes(raw)) == {"a": [b"new", b"more"]}
    raw[raw.index(MARK, raw.index(MARK) + 1) + 20] ^= 1
    assert held(bytes(raw)) == {"a": [b"old"]}


@settings(deadline=None, max_examples=30)
@given(groups=_groups, at=st.integers(0, 12))
def test_a_rewritten_file_holds_the_same(place: Place, groups: Written, at: int) -> None:
    file = JournalFile(place, None, new_header("config", (), ""))
    for number, group in enumerate(groups):
        file.append([group])
        if number == at:
            file.rewrite()
    states = States(groups)
    assert held(place.file.read_bytes()) == states.now
    file.rewrite()
    raw = place.file.read_bytes()
    assert held(raw) == states.now and len(raw) == file.size
    ops = sum(map(len, states.now.values()))
    assert raw.count(MARK) <= max(1, ops) and sorted(p.name for p in place.path.iterdir()) == [
        NAME, "lock",
    ]  # fmt: skip
    file.close()
