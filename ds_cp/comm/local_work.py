"""Work that may fail on one rank alone must not talk to others: they would wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LocalWork:
    """Whether this rank is in work that is its own. Its groups then refuse every exchange."""

    def __init__(self) -> None:
        self._active = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Refuse exchanges within the ``with`` block."""
        before, self._active = self._active, True
        try:
            yield
        finally:
            self._active = before

    def refuse(self, scheme: str, group: str) -> None:
        """Raise ``RuntimeError``, a fault of ds_cp, when called within the ``with`` block."""
        if self._active:
            raise RuntimeError(f"{scheme} in group {group}, within work that is local to one rank")
