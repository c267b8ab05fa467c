"""The chat template of one model: which one it is, what it wants, and conversations as text."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from ds_cp.errors import ChatTemplateError
from ds_cp.templates.messages import (
    Answer,
    Ended,
    Failed,
    Limits,
    Look,
    Looked,
    Render,
    Rendered,
    ToolShape,
)
from ds_cp.templates.processes import TemplateProcesses
from ds_cp.templates.shape import AS_SENT, TEXT, Message, shaped, texts_of
from ds_cp.templates.tools import shaped_calls
from ds_cp.text import shorten

CPU_S = 3.0  # seconds of computing for one conversation; an honest one of 8 MB takes 0.2 s
# Bytes that a rendering may take: for any, and more for each character and each message or part.
MEMORY_BYTES = 64 << 20
MEMORY_PER_CHAR, MEMORY_PER_PIECE = 32, 2048
LOOK_S = 15.0  # seconds by the clock that a start waits for a template to be examined
REASONING = ("reasoning_content", "thinking")  # what templates call it
OTHER_WAY = "use /v1/completions"
TOO_SLOW = "chat_template_too_slow"
_FILE = "chat_template.jinja"
_MAX_FILE_BYTES = 64 << 20  # of tokenizer_config.json, some of which list a whole vocabulary
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_CODE = re.compile(rf"\{{[{{%](?:{_QUOTED.pattern}|[^'\"])*?[%}}]\}}", re.DOTALL)
_SETS = re.compile(r"\bset\s+(\w+)|\bfor\s+([\w\s,()]+?)\s+in\b|\bmacro\s+([^)%]*)")
# What a template has or is told anyway, and words of its language.
_GIVEN = frozenset(
    "messages message role content name type text loop if elif else endif for endfor in is not and "
    "or set endset true false none macro endmacro defined namespace raise_exception".split()
)
_CODES = {"refused": "chat_template_refused", "time": TOO_SLOW}  # by what went wrong


@dataclass(frozen=True)
class Choice:
    """The template that a tokenizer's set of templates gives, or why it gives none; ``notes`` say
    what was left aside."""

    name: str
    text: str | None
    problem: str = ""
    notes: tuple[str, ...] = ()
    absent: bool = False

    def names(self) -> set[str]:
        """Names in the template's code that a value from outside can stand for: neither what
        follows a dot or is in quotes, nor what every rendering has."""
        return set(re.findall(r"(?<![\w.])[^\W\d]\w*", self._code())) - _GIVEN

    def own_names(self) -> set[str]:
        """Of these, the names that the template itself gives values to, perhaps over others."""
        found = _SETS.findall(self._code())
        return {name for names in found for part in names for name in re.findall(r"\w+", part)}

    def _code(self) -> str:
        return " ".join(_QUOTED.sub("''", found) for found in _CODE.findall(self.text or ""))


def choose(templates: Any) -> Choice:
    """Of ``tokenizer.chat_template``, the text; of several by name, the one called "default", as
    transformers does."""
    if templates is None:
        problem = f"this model has no chat template; {OTHER_WAY}"
        return Choice("", None, problem, absent=True)
    name, notes = "default", []
    if isinstance(templates, list | tuple):
        named = [t for t in templates if isinstance(t, Mapping) and "name" in t]
        templates = {str(t["name"]): t.get("template") for t in named}
    if isinstance(templates, Mapping):
        names = ", ".join(shorten(str(n), 40) for n in sorted(map(str, templates))[:8]) or "none"
        if name not in templates:
            return Choice(
                "", None, f"this model has chat templates ({names}) but none called 'default', "
                f"so none is used; {OTHER_WAY}",
            )  # fmt: skip
        if len(templates) > 1:
            notes.append(f"of the model's chat templates ({names}) 'default' is used")
        templates = templates[name]
    if not isinstance(templates, str):
        kind = type(templates).__name__
        return Choice(name, None, f"this model's chat template is no text but {kind}; {OTHER_WAY}")
    if not templates.strip():
        return Choice(name, None, f"this model's chat template is empty; {OTHER_WAY}")
    return Choice(name, templates, notes=tuple(notes))


@dataclass(frozen=True)
class Size:
    """Of a conversation: characters of its texts, and messages and parts. What is no text counts
    as its JSON."""

    chars: int = 0
    pieces: int = 0

    @staticmethod
    def of(messages: Sequence[Message], *beside: Any) -> Size:
        """Count, with what goes into the rendering ``beside`` the messages. Raises
        ``ChatTemplateError`` for what is no text."""
        texts = [texts_of(message.get("content")) for message in messages]
        chars = sum(map(len, chain(*texts))) + sum(_json_chars(one) for one in beside if one)
        for message in messages:
            chars += sum(len(message.get(name) or "") for name in REASONING)
            if calls := message.get("tool_calls"):
                chars += _json_chars(calls)
        return Size(chars, sum(1 + len(of_one) for of_one in texts))


def _json_chars(value: Any) -> int:
    with _sendable():
        return len(msgspec.json.encode(value))


@contextmanager
def _sendable() -> Iterator[None]:
    """Raises ``ChatTemplateError`` for what cannot be sent to a process."""
    try:
        yield
    except UnicodeEncodeError:
        raise ChatTemplateError("messages: half a surrogate pair is not text") from None
    except OverflowError:
        raise ChatTemplateError("messages: an integer has more than 64 bits") from None


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template, in a process beside.

    What the template wants is found out once, by ``look`` or by the first ``render``. May be called
    from several threads; every call ends in time.
    """

    def __init__(
        self,
        tokenizer: Any,
        processes: TemplateProcesses,
        cpu_s: float = CPU_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.choice = choose(getattr(tokenizer, "chat_template", None))
        self._processes = processes
        named = getattr(tokenizer, "special_tokens_map", {})
        self._tokens = {str(name): str(token) for name, token in named.items()}
        self._folder = str(getattr(tokenizer, "name_or_path", ""))
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._looking = threading.Lock()
        self._looked: Looked | None = None
        self._problem = self.choice.problem
        self._code = "no_chat_template"

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the model's chat template ({self.choice.name!r})"

    def look(self, timeout_s: float = LOOK_S) -> list[str]:
        """Examine the template, once; lines for the operator on what is odd about it or its set. A
        model without any is not odd."""
        notes = [*self.choice.notes, *beside(self._folder, self.choice)]
        if self.choice.absent:
            return notes
        try:
            self._look(time.monotonic() + timeout_s)
        except TimeoutError:
            notes.append(f"{self.name} was not examined in {timeout_s:g} s; the first chat will be")
        except OSError as err:
            notes.append(f"{self.name} cannot be rendered: {err}")
        if self._problem:
            return [*notes, f"chat is not available: {self._problem}"]
        found = self._looked
        if found is None:
            return notes
        if any(shape not in (AS_SENT, TEXT) for shape in found.shapes.values()):
            notes.append(f"{self.name} reads content as parts; texts are passed as parts")
        for role in found.lost:
            notes.append(f"{self.name} leaves out what the {role} says")
        if "user" in found.failed:
            notes.append(f"{self.name} fails for a user's text: {found.failed['user']}")
        return notes

    @property
    def available(self) -> bool:
        """Whether conversations may be rendered, as far as is known."""
        return not self._problem

    @property
    def examined(self) -> Looked | None:
        """What was found about the template; None before it was examined."""
        return self._looked

    def tools(self, timeout_s: float) -> ToolShape:
        """What the template makes of tools. Examines it, if that was not done. Raises as
        ``render``."""
        self._look(time.monotonic() + timeout_s)
        return self._looked.tools if self._looked else ToolShape()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        max_chars: int,
        timeout_s: float,
        cpu_s: float | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        values: Mapping[str, Any] = {},
        continue_final: bool = False,
    ) -> str:
        """The conversation as text, equal to transformers' ``apply_chat_template``.

        ``tools`` and ``values``: more that the template can read. Calls in ``messages`` are as
        ``tools`` says. ``continue_final``: the text ends within the last message.

        ``cpu_s``: less computing than a template may have at most; where it takes more, the error's
        code is ``TOO_SLOW``.

        ``content`` of a message: a text, a list of text parts, or None. Raises
        ``ChatTemplateError`` when there is no template, or it refuses or fails or needs too much,
        or a user's text is not in its rendering; ``TimeoutError`` after ``timeout_s`` seconds;
        ``OSError`` when no process can be started, or one is killed from outside.
        """
        deadline = time.monotonic() + timeout_s
        self._look(deadline)
        if self._problem or self.choice.text is None:
            raise ChatTemplateError(self._problem, self._code)
        shapes = self._looked.shapes if self._looked else {}
        size = Size.of(messages, tools, values)
        tool_shape = self._looked.tools if self._looked else ToolShape()
        work = Render(
            self.choice.text,
            self._tokens,
            shaped_calls(shaped(messages, shapes), tool_shape),
            add_generation_prompt,
            max_chars,
            [dict(tool) for tool in tools] or None,
            dict(values),
            continue_final,
        )
        with _sendable():
            answer = self._run(work, self._limits(size, deadline, cpu_s))
        if isinstance(answer, Rendered):
            return answer.text
        code = _CODES.get(_kind(answer), "chat_template_error")
        raise ChatTemplateError(self._reason(answer, size), code)

    def _look(self, deadline: float) -> None:
        if self._looked is not None or self._problem:
            return
        if not self._looking.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise TimeoutError("the template is being examined")
        try:
            if self._looked is None and not self._problem:
                work = Look(self.choice.text or "", self._tokens)
                answer = self._run(work, self._limits(Size(), deadline))
                if isinstance(answer, Looked):
                    self._looked = answer
                else:
                    self._code = "chat_template_error"
                    self._problem = f"{self._reason(answer, Size())}; {OTHER_WAY}"
        finally:
            self._looking.release()

    def _run(self, work: Render | Look, limits: Limits) -> Answer:
        """An answer that says something of the template. A process that ended, but for its time,
        does not: the system may have killed it for another's memory. It raises ``OSError``."""
        answer = self._processes.run(work, limits)
        if isinstance(answer, Ended) and answer.signal != signal.SIGPROF:
            how = signal.strsignal(answer.signal) if answer.signal else f"code {answer.code}"
            raise OSError(f"the process that renders {self.name} ended ({how})")
        return answer

    def _limits(self, size: Size, deadline: float, cpu_s: float | None = None) -> Limits:
        cpu_s = self._cpu_s if cpu_s is None else min(cpu_s, self._cpu_s)
        return Limits(cpu_s, max(deadline - time.monotonic(), 0.001), self._memory(size))

    def _memory(self, size: Size) -> int:
        return self._memory_bytes + MEMORY_PER_CHAR * size.chars + MEMORY_PER_PIECE * size.pieces

    def _reason(self, answer: Answer, size: Size) -> str:
        """One line that names the template and says what happened."""
        kind = _kind(answer)
        text = answer.reason if isinstance(answer, Failed) else ""
        return {
            "refused": f"the model's chat template refuses these messages: {text}",
            "raised": f"{self.name} fails on these messages: {text}",
            "broken": f"{self.name} does not compile: {text}",
            "lost": f"{self.name} leaves out what the user says, so it is not answered: {text!r}",
            "long": f"{self.name} makes {text} of messages of {size.chars}",
            "memory": f"{self.name} needs more than {self._memory(size) >> 20} MiB of memory",
            "time": f"{self.name} does not end within {self._cpu_s:g} s of computing",
        }[kind]


def _kind(answer: Answer) -> str:
    return answer.kind if isinstance(answer, Failed) else "time"


def beside(folder: str, choice: Choice) -> list[str]:
    """Lines on files of a model's folder that name another template than the one in use."""
    path = Path(folder)
    notes = []
    try:
        if not folder or not path.is_dir():
            return []
        stated = _stated(path / "tokenizer_config.json")
        used = _read(path / _FILE) == choice.text is not None
        if used and isinstance(stated, str) and stated != choice.text:
            notes.append(f"{_FILE} is used; tokenizer_config.json has another chat template")
        if choice.text is None and (path / "chat_template.json").is_file():
            notes.append("chat_template.json is of a processor; no tokenizer reads it")
    except (OSError, ValueError):
        pass  # what transformers could read is in use; these are only hints
    return notes


def _stated(path: Path) -> Any:
    found = json.loads(_read(path) or "{}")
    return found.get("chat_template") if isinstance(found, dict) else None


def _read(path: Path) -> str | None:
    """A file's text; None where there is no such file, or one of no sensible size."""
    if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
        return None
    return path.read_text("utf-8")
