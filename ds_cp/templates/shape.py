"""What a chat template wants as ``content``: text, or a list of parts.

Templates differ: some add ``content`` to a string, some walk over its parts, some do either. One
that walks over parts finds none in a string, and the text is gone without an error. So short
conversations are rendered once with a marker in each role, and the shape that keeps it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

AS_SENT = "as_sent"  # text and parts are both read
TEXT = "text"  # parts are joined by line breaks
PARTS = "parts"  # a text becomes one part
ONE_PART = "one_part"  # only the first part is read: all become one

MAX_MISSING = 2  # words of a text that a template may take for its own, such as /no_think
_FIRST, _SECOND, _LEAK = "dscpmarkerone", "dscpmarkertwo", "dscpmarkerleak"
# Conversations in which a role is tried, by role.
_TRIED = {
    "user": (("user",), ("system", "user")),
    "system": (("system", "user"),),
    "assistant": (("user", "assistant", "user"), ("system", "user", "assistant", "user")),
}
_FILLER = "dscpfiller"

Message = dict[str, Any]


def shaped(messages: Sequence[Message], shapes: Mapping[str, str]) -> list[Message]:
    """The messages with their content as the template wants it. A content of None is no text."""
    return [
        {**message, "content": _content(message.get("content"), shapes.get(message["role"], TEXT))}
        for message in messages
    ]


def texts_of(content: Any) -> list[str]:
    """The texts of a message's content: one, or one a part."""
    if content is None:
        return []
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _content(content: Any, shape: str) -> Any:
    if shape == AS_SENT:
        return "" if content is None else content
    if shape == PARTS and isinstance(content, list):
        return content
    text = "\n".join(texts_of(content))
    return text if shape == TEXT else [{"type": "text", "text": text}]


def missing(messages: Sequence[Message], rendering: str) -> str | None:
    """The first text of a user that is not in the rendering, or None. Texts are looked for in
    their order; space around them does not count."""
    position = 0
    for text in _said_by_users(messages):
        found = rendering.find(text, position)
        if found < 0:
            return text
        position = found + len(text)
    return None


def mostly_there(messages: Sequence[Message], rendering: str) -> bool:
    """Whether the words of every user's text are in the rendering, in their order, but for
    ``MAX_MISSING``: a template may change space and case, escape signs and take out words that
    steer it."""
    rendering, position = rendering.casefold(), 0
    for text in _said_by_users(messages):
        gone = 0
        for match in re.finditer(r"\w+", text.casefold()):
            found = rendering.find(match.group(), position)
            if found < 0:
                gone += 1
                if gone > MAX_MISSING:
                    return False
            else:
                position = found + len(match.group())
    return True


def marked(messages: Sequence[Message]) -> list[Message]:
    """The messages with a mark in place of each text of a user: where a mark is not rendered,
    neither is the text. Marks are in small letters, which a template may change."""
    marks = (f"{_FIRST}{i}x" for i in range(1 << 62))
    return [
        {**message, "content": _replaced(message["content"], marks)}
        if message["role"] == "user"
        else message
        for message in messages
    ]


def _replaced(content: Any, marks: Iterator[str]) -> Any:
    if isinstance(content, str):
        return next(marks)
    return [{**part, "text": next(marks)} for part in content]


def _said_by_users(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if message["role"] == "user":
            yield from map(str.strip, texts_of(message["content"]))


def learn(
    render: Callable[[list[Message]], str], passing: tuple[type[Exception], ...]
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """By role, the shape that keeps the text; the roles whose text is lost in every shape; and by
    role the exception where every try raised one.

    ``render`` renders a conversation and may raise anything; exceptions of ``passing`` are raised.
    """
    shapes: dict[str, str] = {}
    lost: list[str] = []
    failed: dict[str, str] = {}
    for role, conversations in _TRIED.items():
        reasons: list[str] = []
        rendered = False
        for roles in conversations:
            tries = {
                shape: _try(render, passing, _conversation(roles, role, shape, shapes), shape)
                for shape in _PROBES
            }
            kept = [shape for shape, (keeps, _) in tries.items() if keeps]
            rendered = rendered or any(reason is None for _, reason in tries.values())
            reasons += [reason for _, reason in tries.values() if reason is not None]
            if kept:
                both = TEXT in kept and PARTS in kept
                shapes[role] = AS_SENT if both else kept[0]
                break
        else:
            if rendered:
                lost.append(role)
            elif reasons:
                failed[role] = reasons[0]
    return shapes, lost, failed


# In the order of preference.
_PROBES: dict[str, Any] = {
    TEXT: _FIRST,
    PARTS: [
        {"type": "text", "text": _FIRST, "probe": _LEAK},
        {"type": "text", "text": _SECOND, "probe": _LEAK},
    ],
    ONE_PART: [{"type": "text", "text": _FIRST, "probe": _LEAK}],
}


def _conversation(
    roles: Sequence[str], role: str, shape: str, shapes: Mapping[str, str]
) -> list[Message]:
    """Marked content in the first turn of ``role``, and a text of no meaning in all others."""
    marked = roles.index(role)
    return [
        {
            "role": other,
            "content": _PROBES[shape]
            if i == marked
            else _content(_FILLER, shapes.get(other, TEXT)),
        }
        for i, other in enumerate(roles)
    ]


def _try(
    render: Callable[[list[Message]], str],
    passing: tuple[type[Exception], ...],
    messages: list[Message],
    shape: str,
) -> tuple[bool, str | None]:
    """Whether a rendering keeps the marked text, and the exception if there was one.

    A template that prints a list of parts as Python would shows their keys too: not kept.
    """
    try:
        rendering = render(messages)
    except passing:
        raise
    except Exception as err:
        return False, f"{type(err).__name__}: {err}"
    rendering = rendering.casefold()
    marks = [_FIRST, _SECOND] if shape == PARTS else [_FIRST]
    return all(mark in rendering for mark in marks) and _LEAK not in rendering, None
