"""One answer on the terminal: asked for, shown as it comes, stopped by Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ds_cp.cli.output import put_at_once
from ds_cp.cli.signals import CtrlC
from ds_cp.cli.terminal import harmless
from ds_cp.client.chat import Begun, Ended, Piece, Progress, Usage, chat_events
from ds_cp.client.connection import Server
from ds_cp.client.state import frame_once
from ds_cp.errors import DsCpError

LOOK_S = 0.5  # seconds between looks at the state while a prompt is processed


@dataclass
class Answer:
    """An answer as far as it has come. ``texts``: its pieces, and those of its reasoning;
    ``ttft_s``: to its first text; ``seconds``: to its end; ``stopped``: by Ctrl-C."""

    texts: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    finish_reason: str | None = None
    usage: Usage | None = None
    progress: Progress | None = None
    ttft_s: float | None = None
    seconds: float = 0.0
    stopped: bool = False

    @property
    def content(self) -> str:
        """Its text."""
        return "".join(self.texts[0])

    @property
    def reasoning(self) -> str:
        """What was thought before."""
        return "".join(self.texts[1])

    def plain(self) -> dict[str, Any]:
        """For ``--json``."""
        usage = self.usage
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning or None,
            "finish_reason": self.finish_reason,
            "stopped": self.stopped,
            "prompt_tokens": None if usage is None else usage.prompt,
            "cached_tokens": None if usage is None else usage.cached,
            "completion_tokens": None if usage is None else usage.completion,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 4),
            "seconds": round(self.seconds, 4),
        }

    def figures(self) -> str:
        """One line for people."""
        parts = ["stopped" if self.stopped else harmless(self.finish_reason or "no end")]
        if self.usage is not None:
            cached = f", {self.usage.cached} cached" if self.usage.cached else ""
            parts.append(f"prompt {self.usage.prompt} tokens{cached}")
            parts.append(f"answer {self.usage.completion} tokens")
        if self.ttft_s is not None:
            parts.append(f"first after {self.ttft_s:.2f} s")
            rest = self.seconds - self.ttft_s
            if self.usage is not None and self.usage.completion > 1 and rest > 0:
                parts.append(f"{(self.usage.completion - 1) / rest:.1f} tokens/s")
        return ", ".join(parts)


class Screen:
    """Where an answer is shown. ``quiet``: nowhere, it is kept for JSON. Reasoning is shown only on
    a terminal, and progress only where stderr is one."""

    def __init__(self, quiet: bool) -> None:
        self.ctrl_c = CtrlC()
        self._quiet = quiet
        self._dim = Console(file=sys.stdout, highlight=False) if sys.stdout.isatty() else None
        self._bar: Bar | None = None
        self._reasoning = False
        self._at_start = True  # of a line
        self._stuck = False  # nobody reads

    def progress(self, found: Progress) -> None:
        """Show how much of the prompt is processed."""
        if self._bar is None:
            console = Console(file=sys.stderr)
            if not console.is_terminal:
                return
            columns = (TextColumn("reading the prompt"), BarColumn(), TaskProgressColumn(),
                       TextColumn("{task.completed:.0f} of {task.total:.0f} tokens"))  # fmt: skip
            self._bar = Bar(*columns, console=console, transient=True)
            self._bar.add_task("")
            self._bar.start()
        (task,) = self._bar.task_ids
        self._bar.update(task, completed=found.processed, total=max(found.total, 1))

    def piece(self, piece: Piece) -> None:
        """Show some text. ``OutputError`` when stdout cannot be written; ``CancelledError`` after
        Ctrl-C, also one that comes while nobody reads stdout."""
        self.end_progress()
        if self._quiet:
            return
        text = harmless(piece.text)
        if piece.reasoning:
            if self._dim is not None:
                with self._dim.capture() as shown:
                    self._dim.print(Text(text, style="dim"), end="", soft_wrap=True)
                self._write(shown.get())
                self._reasoning, self._at_start = True, text.endswith("\n")
            return
        if self._reasoning:
            text = ("" if self._at_start else "\n") + "\n" + text.lstrip("\n")
            self._reasoning = False
        self._write(text)
        if text:
            self._at_start = text.endswith("\n")

    def _write(self, text: str) -> None:
        try:
            with self.ctrl_c.breaking():
                self._stuck = True
                put_at_once(text)
                self._stuck = False
        except KeyboardInterrupt:
            raise asyncio.CancelledError from None

    def end_progress(self) -> None:
        """Take the progress off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def end(self) -> None:
        """The answer has ended: the next thing begins on a line of its own."""
        self.end_progress()
        if not self._at_start and not self._stuck:
            put_at_once("\n")


def ask(server: Server, body: Mapping[str, Any], screen: Screen) -> tuple[Answer, DsCpError | None]:
    """Ask and show. The answer as far as it came, and the error that ended it, if one did."""
    answer = Answer()
    try:
        asyncio.run(_ask(server, body, screen, answer))
    except DsCpError as err:
        return answer, err
    except KeyboardInterrupt:  # before the loop took care of it
        answer.stopped = True
    finally:
        screen.end()
    return answer, None


async def _ask(server: Server, body: Mapping[str, Any], screen: Screen, answer: Answer) -> None:
    began = time.monotonic()
    task = asyncio.current_task()
    assert task is not None

    with screen.ctrl_c.caught(task.cancel):
        try:
            async with server.client() as client:
                async with contextlib.aclosing(chat_events(server, client, body)) as events:
                    await _show(server, client, events, screen, answer, began)
        except asyncio.CancelledError:
            answer.stopped = True
        finally:
            answer.seconds = time.monotonic() - began


async def _show(
    server: Server, client: httpx.AsyncClient, events: AsyncIterator[Any], screen: Screen,
    answer: Answer, began: float,
) -> None:  # fmt: skip
    looking: asyncio.Task[None] | None = None

    def progress(found: Progress) -> None:
        answer.progress = found
        if answer.ttft_s is None:
            screen.progress(found)

    try:
        async for event in events:
            if isinstance(event, Begun) and event.id:
                looking = asyncio.create_task(_look(server, client, event.id, progress))
            elif isinstance(event, Progress | Piece) and looking is not None:
                looking.cancel()  # the stream itself says more
                looking = None
            if isinstance(event, Progress):
                progress(event)
            elif isinstance(event, Piece):
                if answer.ttft_s is None:
                    answer.ttft_s = time.monotonic() - began
                answer.texts[event.reasoning].append(event.text)
                screen.piece(event)
            elif isinstance(event, Usage):
                answer.usage = event
            elif isinstance(event, Ended):
                answer.finish_reason = event.finish_reason
    finally:
        if looking is not None:
            looking.cancel()


async def _look(
    server: Server, client: httpx.AsyncClient, id: str, progress: Callable[[Progress], None]
) -> None:
    """Report the progress of the request ``id`` from the server's live picture, where it has
    one."""
    while True:
        try:
            frame = await frame_once(server, client)
        except DsCpError:
            return
        for request in frame.picture.requests if frame.picture else ():
            if request.id.startswith(id) and request.phase == "prefill":
                progress(Progress(request.computed, request.to_compute, request.cached_tokens))
        await asyncio.sleep(LOOK_S)
