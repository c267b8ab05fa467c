"""The output of a response as it comes: its items, and the protocol's events of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any

from ds_cp.api.chat.events import (
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    Content,
    Event,
    FinishReason,
    Reasoning,
)
from ds_cp.api.responses.items import (
    Item,
    call_item,
    output_text,
    reasoning_item,
    sealed,
    text_item,
)

Json = dict[str, Any]


class Output:
    """Turns the events of one answer into items and into those of the protocol, which lack their
    ``sequence_number``. At most one item is open at a time.

    ``seal``: reasoning comes in ``encrypted_content`` too.
    """

    def __init__(self, *, seal: bool = False) -> None:
        self.items: list[Item] = []  # the last one may be open
        self._seal = seal
        self._open: str | None = None  # the type of the open item
        self._text = StringIO()
        self._logprobs: list[Json] = []  # of the open message
        self._ahead: list[Json] = []  # of tokens whose text has not come

    def take(self, events: Sequence[Event], logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        """The events of one step. ``logprobs``: of its tokens; those of text are given with it."""
        self._ahead += logprobs
        for event in events:
            match event:
                case Content(text):
                    yield from self._begin("message")
                    self._text.write(text)
                    entries, self._ahead = self._ahead, []
                    self._logprobs += entries
                    yield self._of_part("output_text.delta", delta=text, logprobs=entries)
                case Reasoning(text):
                    yield from self._begin("reasoning")
                    self._ahead = []
                    self._text.write(text)
                    yield self._of_part("reasoning_text.delta", delta=text)
                case CallBegin(_, call_id, name):
                    yield from self.close()
                    self._ahead = []
                    self._open = "function_call"
                    yield self._added(call_item(call_id, name, "", "in_progress"))
                case ArgumentsDelta(_, text):
                    self._ahead = []
                    self._text.write(text)
                    yield self._of_item("function_call_arguments.delta", delta=text)
                case CallEnd(_, complete):
                    self._ahead = []
                    yield from self.close("completed" if complete else "incomplete")

    def finish(self, reason: FinishReason) -> Iterator[Json]:
        """The end of the answer."""
        if self._open == "message":
            self._logprobs += self._ahead
        yield from self.close("incomplete" if reason == "length" else "completed")

    def close(self, status: str = "completed") -> Iterator[Json]:
        """End the open item, if there is one."""
        kind, text = self._open, self._text.getvalue()
        if kind is None:
            return
        self._open, self._text = None, StringIO()
        item = self.items[-1]
        item["status"] = status
        match kind:
            case "message":
                logprobs, self._logprobs = self._logprobs, []
                part = output_text(text, logprobs)
                yield self._of_part("output_text.done", text=text, logprobs=logprobs)
                yield self._of_part("content_part.done", part=part)
                item["content"] = [part]
            case "reasoning":
                part = {"type": "reasoning_text", "text": text}
                yield self._of_part("reasoning_text.done", text=text)
                yield self._of_part("content_part.done", part=part)
                item["content"] = [part]
                if self._seal:
                    item["encrypted_content"] = sealed(text)
            case _:
                item["arguments"] = text
                yield self._of_item("function_call_arguments.done", arguments=text)
        yield self._item_event("output_item.done", item)

    def _begin(self, kind: str) -> Iterator[Json]:
        """Open an item of a text, unless one of its kind is open."""
        if self._open == kind:
            return
        yield from self.close()
        self._open = kind
        if kind == "message":
            item, part = text_item("assistant", ""), output_text("")
        else:
            item, part = reasoning_item(""), {"type": "reasoning_text", "text": ""}
        yield self._added(item | {"status": "in_progress", "content": []})
        yield self._of_part("content_part.added", part=part)

    def _added(self, item: Item) -> Json:
        self.items.append(item)
        return self._item_event("output_item.added", dict(item))

    def _item_event(self, kind: str, item: Item) -> Json:
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, "item": item}

    def _of_item(self, kind: str, **more: Any) -> Json:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **place, **more}

    def _of_part(self, kind: str, **more: Any) -> Json:
        return self._of_item(kind, content_index=0, **more)
