"""Text that is held back until it is known what it is."""

from __future__ import annotations

from collections import deque

BYTES = 4  # of memory that a character takes here at most, about
_APART = 64  # pieces that are kept as they came, before they become one


class HeldText:
    """A text that grows by pieces, often of a token each: in time linear in it, and in the memory
    of its characters, of which a string apart needs 15 times as much as a letter.

    ``most``: characters that are kept, about: of more, the first ones are dropped.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._whole: deque[str] = deque()
        self._apart: list[str] = []
        self.chars = 0

    def __bool__(self) -> bool:
        return self.chars > 0

    def append(self, text: str) -> None:
        """One more piece."""
        if not text:
            return
        self._apart.append(text)
        self.chars += len(text)
        if len(self._apart) < _APART:
            return
        self._whole.append("".join(self._apart))
        self._apart = []
        while self._most is not None and self.chars - len(self._whole[0]) >= self._most:
            self.chars -= len(self._whole.popleft())

    def take(self) -> str:
        """All of it; nothing is held then."""
        text = "".join((*self._whole, *self._apart))
        self.clear()
        return text

    def clear(self) -> None:
        """Hold nothing."""
        if self.chars:
            self._whole.clear()
            self._apart = []
            self.chars = 0
