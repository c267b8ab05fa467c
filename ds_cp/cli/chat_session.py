"""A conversation with a server: its commands, and the loop that reads them."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Callable
from typing import Any

from ds_cp.cli.chat_answer import Screen, ask
from ds_cp.cli.chat_input import FENCE, Prompter, piped_lines, piped_text
from ds_cp.cli.conversation import Conversation, attach
from ds_cp.cli.output import put, say
from ds_cp.cli.settings import SETTINGS
from ds_cp.cli.terminal import harmless
from ds_cp.client.chat import first_model
from ds_cp.client.connection import Server
from ds_cp.errors import DsCpError, RequestError
from ds_cp.text import nearest, shorten

STOPPED = 130  # exit code after Ctrl-C


class Session:
    """``model``: None for the server's first. ``as_json``: answers as objects. ``loaded``: the file
    that ``talk`` is from."""

    def __init__(
        self, server: Server, talk: Conversation, model: str | None, *, as_json: bool,
        loaded: str | None = None,
    ) -> None:  # fmt: skip
        self._server = server
        self._talk = talk
        self._model = model
        self._as_json = as_json
        self._written = {loaded} if loaded else set()  # files that /save may write over
        self._stopped = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "this list", self._help),
            "/system": ("[TEXT]", "set the system prompt, or show it; - for none", self._system),
            "/set": ("[NAME [VALUE]]", "set one of the settings, unset it, or show all", self._set),
            "/file": ("PATH [MESSAGE]", "begin the next question with a file's text", self._file),
            "/retry": ("", "ask the last question again", self._retry),
            "/undo": ("", "forget the last question and its answer", self._undo),
            "/clear": ("", "forget all; the system prompt and settings stay", self._clear),
            "/save": ("FILE", "write the conversation to a file", self._save),
            "/load": ("FILE", "go on with the conversation of a file", self._load),
            "/exit": ("", "leave; so does Ctrl-D", lambda rest: None),
        }

    def converse(self) -> int:
        """Talk with a person at the terminal until they leave. Their mistakes and the server's
        failures are a line each. Returns the exit code."""
        name, length = self._find_model()
        tokens = f", {length} tokens" if length else ""
        say(harmless(f"{name}{tokens}, at {self._server.url}"))
        say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        prompter = Prompter(list(self._commands))
        while True:
            try:
                line = prompter.read()
            except EOFError:
                say("")
                return 0
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /exit leaves)")
                continue
            try:
                if self._is_end(line):
                    return 0
                self.handle(line)
            except DsCpError as err:
                say(f"ds_cp: error: {_line(err)}")
            except KeyboardInterrupt:
                say("")

    def follow(self, first: str | None) -> int:
        """Handle each line of stdin as if it was typed, ``first`` before them. The first error ends
        it, by being raised. Returns the exit code."""
        for line in [*([first] if first else []), *piped_lines()]:
            if self._is_end(line):
                break
            self.handle(line)
            if self._stopped:
                return STOPPED
        return 0

    def once(self, message: str | None) -> int:
        """Ask one question: ``message``, and below it what comes from a pipe. Returns the exit
        code."""
        piped = "" if sys.stdin.isatty() else piped_text()
        text = "\n\n".join(part for part in (message, piped.rstrip("\n")) if part)
        if not text:
            raise RequestError("there is no question: stdin is empty; write one, or give MESSAGE")
        self._talk.ask(text)
        self._answer()
        return STOPPED if self._stopped else 0

    def handle(self, line: str) -> None:
        """A command, or a question, which is answered. Raises the errors of either."""
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._talk.ask(line.removeprefix("/") if line.startswith("//") else line)
            self._answer()
            return
        name, _, rest = line.partition(" ")
        name = "/exit" if name == "/quit" else name.strip()
        if name not in self._commands:
            near = nearest(name, self._commands, self._commands)
            raise RequestError(
                f"there is no command {shorten(name, 40)}; the nearest one is {near}. "
                "A question that begins with / is written with //"
            )
        self._commands[name][2](rest.strip())

    def _is_end(self, line: str) -> bool:
        return line.strip() in ("/exit", "/quit")

    def _find_model(self) -> tuple[str, int | None]:
        if self._model is not None:
            return self._model, None

        async def find() -> tuple[str, int | None]:
            async with self._server.client() as client:
                return await first_model(self._server, client)

        found = asyncio.run(find())
        self._model = found[0]
        return found

    def _answer(self) -> None:
        """Ask the pending question. An answer that Ctrl-C stopped is kept as far as it came."""
        name, _ = self._find_model()
        body: dict[str, Any] = {"model": name, "messages": self._talk.messages()}
        answer, err = ask(self._server, body | self._talk.settings, Screen(quiet=self._as_json))
        self._stopped = answer.stopped
        if err is not None:
            raise err
        if answer.content or not answer.stopped:
            self._talk.answer(answer.content)
        if self._as_json:
            put(json.dumps(answer.plain()))
            sys.stdout.flush()
        elif sys.stderr.isatty():
            say(f"({answer.figures()})")

    def _help(self, rest: str) -> None:
        for name, (takes, what, _) in self._commands.items():
            say(f"  {f'{name} {takes}':24} {what}")
        say(f"  {f'{FENCE} ... {FENCE}':24} a question of several lines")
        say("settings: " + ", ".join(SETTINGS))

    def _system(self, rest: str) -> None:
        if rest:
            self._talk.system = None if rest == "-" else rest
        say(harmless(f"system prompt: {self._talk.system or 'none'}"))

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if name:
            self._talk.set(name.replace("-", "_"), text.strip())
        settings = self._talk.settings
        shown = ", ".join(f"{key} {json.dumps(settings[key])}" for key in settings)
        say(f"settings: {shown or 'those of the server'}")

    def _file(self, rest: str) -> None:
        path, message = _first_word(rest)
        if not path:
            raise RequestError("/file needs the path of a text file")
        text = attach(path)
        self._talk.attached.append(text)
        if message:
            self._talk.ask(message)
            self._answer()
        else:
            say(f"{path}: {len(text)} characters, with the next question")

    def _retry(self, rest: str) -> None:
        if not self._talk.again():
            raise RequestError("there is no question to ask again")
        self._answer()

    def _undo(self, rest: str) -> None:
        question = self._talk.undo()
        if question is None:
            raise RequestError("there is no question to forget")
        say(f"forgotten: {shorten(question)}")

    def _clear(self, rest: str) -> None:
        self._talk.clear()
        say("all forgotten")

    def _save(self, rest: str) -> None:
        path, _ = _first_word(rest)
        if not path:
            raise RequestError("/save needs the path of a file")
        self._talk.save(path, over=path in self._written)
        self._written.add(path)
        say(f"written to {path}")

    def _load(self, rest: str) -> None:
        path, _ = _first_word(rest)
        if not path:
            raise RequestError("/load needs the path of a file")
        self._talk = Conversation.load(path)
        self._written.add(path)
        say(f"{len(self._talk.turns)} questions with answers")


def _first_word(text: str) -> tuple[str, str]:
    """A path, quoted where it has blanks, and what follows it."""
    if text[:1] not in ("'", '"'):
        path, _, rest = text.partition(" ")
        return path, rest.strip()
    end = text.find(text[0], 1)
    if end < 0:
        raise RequestError("a quote is not closed")
    return shlex.split(text[: end + 1])[0], text[end + 1 :].strip()


def _line(err: Exception) -> str:
    return harmless(" ".join(str(err).split()))
