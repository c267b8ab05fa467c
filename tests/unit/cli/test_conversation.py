"""The conversation as data: turns, settings, and its file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ds_cp.cli.chat_input import candidates
from ds_cp.cli.conversation import Conversation, attach
from ds_cp.errors import OutputError, RequestError


def said(talk: Conversation) -> list[str]:
    return [f"{m['role'][0]}:{m['content']}" for m in talk.messages()]


def test_turns() -> None:
    talk = Conversation(system="be brief")
    talk.ask("one?")
    assert said(talk) == ["s:be brief", "u:one?"]
    talk.answer("1")
    talk.ask("two?")
    talk.ask("three?")  # the one before was not answered
    talk.answer("3")
    assert said(talk) == ["s:be brief", "u:one?", "a:1", "u:three?", "a:3"]
    assert talk.again() and said(talk)[-1] == "u:three?" and len(said(talk)) == 4
    talk.answer("3.")
    assert talk.undo() == "three?" and said(talk)[-1] == "a:1"
    talk.ask("lost?")
    assert talk.undo() == "lost?" and talk.undo() == "one?" and talk.undo() is None
    assert not talk.again() and said(talk) == ["s:be brief"]
    talk.attached.append("a book")
    talk.ask("what is it?")
    assert said(talk)[-1] == "u:a book\n\nwhat is it?" and talk.attached == []
    talk.attached.append("x")
    talk.clear()
    assert said(talk) == ["s:be brief"] and not talk.attached


def test_settings() -> None:
    talk = Conversation()
    for name, text, value in (
        ("temperature", "0.5", 0.5), ("max_tokens", "7", 7), ("stop", "'a b' c", ["a b", "c"]),
        ("seed", "-3", -3), ("top_k", "5", 5),
    ):  # fmt: skip
        talk.set(name, text)
        assert talk.settings[name] == value
    talk.set("seed", "")
    assert "seed" not in talk.settings
    for name, text, part in (
        ("temprature", "1", "nearest one is temperature"), ("temperature", "9", "temperature is 9"),
        ("temperature", "nan", "must be a number"), ("temperature", "inf", "must be a number"),
        ("max_tokens", "1.5", "must be an integer"), ("max_tokens", "0", "max_tokens is 0"),
        ("stop", "'", "words, quoted"), ("top_p", "x\x1b[2J", "top_p is x [2J"),
    ):  # fmt: skip
        before = dict(talk.settings)
        with pytest.raises(RequestError) as err:
            talk.set(name, text)
        assert part in str(err.value) and talk.settings == before


def test_a_file_and_back(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk = Conversation(system="s", settings={"temperature": 0.0})
    talk.ask("é \ud800?")
    talk.answer("ja\n")
    talk.ask("and?")
    talk.save(str(file), over=False)
    assert file.stat().st_mode & 0o077 == 0 and os.listdir(tmp_path) == ["talk.json"]
    again = Conversation.load(str(file))
    assert (again.messages(), again.settings) == (talk.messages(), talk.settings)
    with pytest.raises(OutputError, match="is there already"):
        talk.save(str(file), over=False)
    talk.clear()
    talk.save(str(file), over=True)
    assert Conversation.load(str(file)).messages() == [{"role": "system", "content": "s"}]
    with pytest.raises(OutputError, match="cannot write .*: No such file"):
        talk.save(str(tmp_path / "no" / "x"), over=False)
    (tmp_path / "dir").mkdir()
    with pytest.raises(OutputError):
        talk.save(str(tmp_path / "dir"), over=True)
    assert sorted(os.listdir(tmp_path)) == ["dir", "talk.json"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not valid JSON"), ("3", "needs a list messages"), ("{}", "needs a list messages"),
        ('{"messages": 3}', "needs a list"), ('[{"role": "tool", "content": "x"}]', "messages[0]"),
        ('[{"role": "user", "content": 3}]', "messages[0]"), ("[3]", "messages[0]"),
        ('[{"role": "assistant", "content": "x"}]', "out of turn"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]', "messages[1]"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "out of turn"),
        ('{"messages": [], "settings": {"temperature": 99}}', "temperature is 99"),
        ('{"messages": [], "messages": []}', "given twice"), ("\xff", "wrong byte at 0"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError) as err:
        Conversation.load(str(file))
    assert part in str(err.value) and "\n" not in str(err.value) and "prompt file" not in str(err)


def test_the_body_of_a_request_is_a_conversation(tmp_path: Path) -> None:
    file = tmp_path / "body.json"
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    file.write_text(json.dumps(body))
    assert Conversation.load(str(file)).pending == "x"


def test_files_are_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ein Buch\n")
    assert attach(str(tmp_path / "a.txt")) == "ein Buch\n"
    with pytest.raises(RequestError, match="cannot read .*none"):
        attach(str(tmp_path / "none"))


def test_completion_of_a_line(tmp_path: Path) -> None:
    assert candidates("/s", ["/save", "/set", "/undo"], True) == ["/save ", "/set "]
    (tmp_path / "book.txt").write_text("")
    (tmp_path / "books").mkdir()
    assert candidates(f"{tmp_path}/bo", [], False) == [f"{tmp_path}/book.txt", f"{tmp_path}/books/"]
    assert candidates(f"{tmp_path}/*", [], False) == []
