"""A conversation as plain data: messages, settings, and the file that holds both."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_cp.cli.prompts import read_text
from ds_cp.cli.settings import SETTINGS, setting
from ds_cp.errors import OutputError, RequestError
from ds_cp.sampling_params import SamplingParams
from ds_cp.text import nearest, parse_json, shorten

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 10_000  # messages of a file


@dataclass
class Conversation:
    """``turns``: questions and answers, in pairs. ``pending``: a question that was not answered.
    ``attached``: texts that the next question begins with."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    pending: str | None = None
    attached: list[str] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """A new question, below the texts that were attached."""
        self.pending = "\n\n".join([*self.attached, *([text] if text else [])])
        self.attached = []

    def answer(self, text: str) -> None:
        """The answer to the pending question."""
        assert self.pending is not None
        self.turns.append((self.pending, text))
        self.pending = None

    def again(self) -> bool:
        """Make the last question the pending one; whether there is any."""
        if self.pending is None and self.turns:
            self.pending, _ = self.turns.pop()
        return self.pending is not None

    def undo(self) -> str | None:
        """Forget the last question and its answer; the question, None when there was none."""
        if self.pending is not None:
            last, self.pending = self.pending, None
            return last
        return self.turns.pop()[0] if self.turns else None

    def clear(self) -> None:
        """Forget all questions and answers. The system prompt and the settings stay."""
        self.turns, self.pending, self.attached = [], None, []

    def messages(self) -> list[dict[str, str]]:
        """All messages up to the pending question, as the protocol has them."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in self.turns:
            found.append({"role": "user", "content": question})
            found.append({"role": "assistant", "content": answer})
        if self.pending is not None:
            found.append({"role": "user", "content": self.pending})
        return found

    def set(self, name: str, text: str) -> None:
        """Set, or with an empty text unset, one of ``SETTINGS``. ``RequestError`` says what it may
        be."""
        if name not in SETTINGS:
            near = nearest(name, SETTINGS, SETTINGS)
            raise RequestError(f"there is no setting {shorten(name)}; the nearest one is {near}")
        rest = {key: value for key, value in self.settings.items() if key != name}
        if text:
            rest[name] = setting(name, text)
            SamplingParams(**rest)
        self.settings = rest

    def save(self, file: str, *, over: bool) -> None:
        """Write the conversation to ``file``, whole or not at all. ``OutputError`` when it exists
        and is not to be written ``over``, or cannot be written."""
        if not over and os.path.lexists(file):
            raise OutputError(f"{file} is there already; name another file")
        plain = {"messages": self.messages(), "settings": self.settings}
        path = Path(file).absolute()
        text = json.dumps(plain, indent=1) + "\n"
        name = None
        try:
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as part:
                name = part.name
                part.write(text)
            os.replace(name, path)
        except OSError as err:
            if name is not None:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            raise OutputError(f"cannot write {file}: {err.strerror or err}") from None

    @classmethod
    def load(cls, file: str) -> Conversation:
        """What ``save`` wrote, or the body of a chat request. ``RequestError`` says what is
        wrong."""
        try:
            return cls._of(parse_json(read_text(file)))
        except RequestError as err:
            raise RequestError(str(err).replace("prompt file ", "")) from None
        except ValueError as err:
            raise RequestError(f"{file} holds no conversation: {err}") from None

    @classmethod
    def _of(cls, plain: Any) -> Conversation:
        messages = plain.get("messages") if isinstance(plain, dict) else plain
        if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
            raise ValueError(f"it needs a list messages of at most {MAX_MESSAGES}")
        made = cls()
        for number, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            text = message.get("content") if isinstance(message, dict) else None
            if role not in ROLES or not isinstance(text, str):
                raise ValueError(f"messages[{number}] is no text of system, user or assistant")
            if role == "system" and number == 0:
                made.system = text
            elif role == "user" and made.pending is None:
                made.pending = text
            elif role == "assistant" and made.pending is not None:
                made.answer(text)
            else:
                raise ValueError(f"messages[{number}] is of {role}, out of turn")
        settings = plain.get("settings") if isinstance(plain, dict) else None
        if isinstance(settings, dict):
            made.settings = {name: settings[name] for name in SETTINGS if name in settings}
            SamplingParams(**made.settings)
        return made


def attach(file: str) -> str:
    """The text of a file for a question. ``RequestError`` when it is none, or too large."""
    try:
        return read_text(file)
    except RequestError as err:
        raise RequestError(str(err).replace("prompt file ", "")) from None
