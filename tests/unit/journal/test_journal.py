"""A journal as a whole: requests go on, whose journal it is, and what is wrong with a file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ds_cp.config import Config, load_config
from ds_cp.errors import LaunchError
from ds_cp.journal.file import Change, JournalFile, new_header
from ds_cp.journal.format import MAGIC, Kind
from ds_cp.journal.journal import KEEP_S, Journal, config_digest
from ds_cp.journal.place import NAME, Place
from ds_cp.outputs import Delta, TokenLogprob
from ds_cp.sampling_params import KnownAnswer, SamplingParams

MODEL = ("a", "b", "c", "tokenizer")
PARAMS = SamplingParams(
    max_tokens=50, stop=("x",), logit_bias={3: 1.0}, kept_special_tokens=frozenset({7, 5}),
    structured_outputs={"regex": "[ab]+"},
)  # fmt: skip


def config(**sections: Any) -> Config:
    return load_config(sections, {"model": "m"})


def opened(folder: Path, model: tuple[str, ...] = MODEL, **sections: Any) -> Journal:
    journal = Journal(str(folder / "x"), config(**sections))
    try:
        journal.start(model)
    except BaseException:
        journal.close()
        raise
    return journal


def refused(folder: Path, model: tuple[str, ...] = MODEL, **sections: Any) -> str:
    with pytest.raises(LaunchError) as caught:
        opened(folder, model, **sections)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text


def test_a_request_goes_on(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    params = journal.requests.begin("line/0", [1, 2, 70000], PARAMS)
    assert params.seed is not None
    scored = (TokenLogprob(9, -0.5, ((9, -0.5), (8, -1.0)), 3),)
    for n in range(5):
        journal.requests.record("line/0", Delta("e", (n,), f"t{n}", cached_tokens=2 if n == 0
                                                else None))  # fmt: skip
        if n == 2:
            journal.requests.flush()
    journal.requests.record("line/0", Delta("e", (9,), "", scored, finish_reason="abort"))
    journal.close()
    journal = opened(tmp_path)
    assert journal.requests.resume("line/0", SamplingParams(max_tokens=51)) is None
    resumed = journal.requests.resume("line/0", PARAMS)
    assert resumed is not None and resumed.prompt == [1, 2, 70000] and resumed.params == params
    assert resumed.known == (KnownAnswer((0, 1, 2, 3, 4)),)
    first, *rest = resumed.deltas
    assert first == Delta("", (0,), "t0", cached_tokens=2)
    assert rest == [Delta("", (n,), f"t{n}") for n in range(1, 5)]
    # It is there until something comes to it: a refusal for want of room does not lose it.
    assert journal.requests.resume("line/0", PARAMS) == resumed
    journal.requests.record("line/0", Delta("f", (5,), "t5", scored, "stop", "x"))
    assert journal.requests.resume("line/0", PARAMS) is None
    journal.close()
    journal = opened(tmp_path)
    resumed = journal.requests.resume("line/0", PARAMS)
    assert resumed is not None
    assert resumed.known == (KnownAnswer((0, 1, 2, 3, 4, 5), "stop", "x"),)
    assert resumed.deltas[-1] == Delta("", (5,), "t5", scored, "stop", "x")
    journal.submit(journal.requests.forget("line"))
    journal.close()
    journal = opened(tmp_path)
    assert journal.requests.resume("line/0", PARAMS) is None and not journal.requests.groups
    journal.close()


def test_log_probabilities_of_a_prompt_are_computed_again(tmp_path: Path) -> None:
    """The request has its seed, and no token is skipped that its first delta would come with."""
    params = SamplingParams(max_tokens=5, prompt_logprobs=1)
    journal = opened(tmp_path)
    seed = journal.requests.begin("a/0", [1], params).seed
    journal.requests.record("a/0", Delta("e", (4,), "x"))
    journal.close()
    journal = opened(tmp_path)
    resumed = journal.requests.resume("a/0", params)
    assert resumed is not None and resumed.params.seed == seed
    assert resumed.known == (KnownAnswer(),) and resumed.deltas == ()
    journal.close()


def test_of_another_model_config_tokenizer_version(tmp_path: Path) -> None:
    opened(tmp_path).close()
    assert "journal of another model" in refused(tmp_path, ("a", "b", "other", "tokenizer"))
    assert "journal of another tokenizer" in refused(tmp_path, ("a", "b", "c", "other"))
    assert "journal of another config" in refused(tmp_path, dtype="bf16")
    other = {"server": {"port": 1}, "comm": {"timeout_s": 99}}
    opened(tmp_path, **other).close()  # these decide no token
    assert config_digest(config(**other)) == config_digest(config())
    file = tmp_path / "x" / NAME
    raw = bytearray(file.read_bytes())
    raw[len(MAGIC)] = 9
    file.write_bytes(raw)
    assert "is of version 9; this ds_cp reads version 1; move it away" in refused(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{}", bytes(4096), MAGIC + b"\1\0\xff\0\0\0"])
def test_not_a_journal(raw: bytes, tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "x" / NAME).write_bytes(raw)
    assert "move it away (nothing of it is resumed then)" in refused(tmp_path)
    (tmp_path / "x" / NAME).unlink()
    opened(tmp_path).close()  # the way out is one; the lock was given back


def test_others_may_read_the_file(tmp_path: Path) -> None:
    opened(tmp_path).close()
    os.chmod(tmp_path / "x" / NAME, 0o644)
    assert "chmod 600" in refused(tmp_path)


def test_the_start_says_what_was_dropped(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.requests.begin("a/0", [1], PARAMS)
    journal.close()
    with (tmp_path / "x" / NAME).open("ab") as file:
        file.write(b"torn")
    journal = Journal(str(tmp_path / "x"), config())
    lines = journal.start(MODEL)
    assert any("its last 4 bytes were not whole and are dropped" in line for line in lines), lines
    journal.close()


def test_what_nobody_came_back_to_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(tmp_path)
    journal.requests.begin("a/0", [1], PARAMS)
    journal.submit([Change(Kind.PUT, "said:x", b"")])
    journal.close()
    now = time.time() + KEEP_S + 10
    monkeypatch.setattr(time, "time", lambda: now)
    journal = opened(tmp_path)
    assert not journal.requests.groups and list(journal.stored) == ["said:x"]
    journal.close()
    assert b"request:" not in _live(tmp_path)


def _live(folder: Path) -> bytes:
    place = Place(str(folder / "x"))
    from ds_cp.journal.file import read_journal

    found = read_journal(place)
    assert found is not None
    JournalFile(place, found, found.header).rewrite()
    place.close()
    return (folder / "x" / NAME).read_bytes()


def test_a_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(str(tmp_path / "x"), config())

    def full(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LaunchError, match="cannot be written: No space left.*make room"):
        journal.start(MODEL)
    monkeypatch.undo()
    journal.close()


def test_headers_have_secrets_of_their_own() -> None:
    assert new_header("c", (), "").secret != new_header("c", (), "").secret
