"""What a process that renders chat templates is asked and answers (``ds_cp.frames``)."""

from __future__ import annotations

from typing import Any

import msgspec


class Render(msgspec.Struct, frozen=True, tag="render"):
    """Render ``messages``. ``tokens``: the tokenizer's special tokens by name. A rendering has at
    most ``max_chars`` characters. ``tools``: None for none. ``values``: more that the template can
    read. ``continue_final``: end within the last message."""

    template: str
    tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    max_chars: int
    tools: list[dict[str, Any]] | None = None
    values: dict[str, Any] = {}
    continue_final: bool = False


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Find out what shape of content a template wants, by rendering short conversations."""

    template: str
    tokens: dict[str, str]


class ToolShape(msgspec.Struct, frozen=True):
    """What a template makes of tools. ``offers``: it writes a request's tools. ``history``: it
    writes earlier calls and their results, if the arguments of a call are JSON text
    (``text_arguments``) or an object, and content that is empty is null beside a call
    (``null_content``) or "". ``system``: it writes what a system message says;
    ``late_system``: of one behind a user's too."""

    offers: bool = False
    history: bool = False
    text_arguments: bool = False
    null_content: bool = False
    system: bool = True
    late_system: bool = True


class Limits(msgspec.Struct, frozen=True):
    """What one job may take: seconds of computing, seconds by the clock, bytes of memory more than
    the process has. The kernel ends a process that passes either time."""

    cpu_s: float
    wall_s: float
    memory_bytes: int


class Job(msgspec.Struct, frozen=True):
    """One piece of work with its limits."""

    work: Render | Look
    limits: Limits


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    """The text of a conversation."""

    text: str


class Looked(msgspec.Struct, frozen=True, tag="looked"):
    """What was found about a template. ``shapes``: by role, what its content must be like
    (``ds_cp.templates.shape``). ``lost``: roles whose text the template leaves out.
    ``failed``: the exception by role where every try ended with one. ``tools``: what it makes of
    tools (``ds_cp.templates.tools``)."""

    shapes: dict[str, str]
    lost: list[str]
    failed: dict[str, str]
    tools: ToolShape = ToolShape()


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """No rendering. ``kind``: "refused" (by the template's author), "raised", "broken" (it does
    not compile), "memory", "long", "lost" (a user's text is not in the rendering) or "unavailable"
    (the process cannot render at all). ``reason`` is one line."""

    kind: str
    reason: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The process ended before it answered: by signal number ``signal``, or with exit code
    ``code``."""

    signal: int
    code: int


Answer = Rendered | Looked | Failed | Ended
