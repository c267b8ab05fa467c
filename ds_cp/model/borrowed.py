"""A model object of the caller's while an engine uses it, and as it was afterwards.

An engine sends the model's attention through itself and may replace what its layers compute, so one
model serves one engine at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from ds_cp.errors import ConfigError
from ds_cp.model.invariant import restore_layers
from ds_cp.model.linear import unpack
from ds_cp.model.wiring import Decoder

_MARK = "_ds_cp_borrowed"  # attribute of a model that an engine uses


@dataclass(frozen=True)
class _Mark:
    """``by``: dead once an engine that nobody shut down is gone; ``attention``: the model's own."""

    by: ReferenceType[Borrowed]
    attention: Any


class Borrowed:
    """What an engine holds as long as it uses ``model``, of a caller's; anything else than a
    decoder, such as a path, is none (``model`` is ``None``)."""

    def __init__(self, model: object) -> None:
        self.model = model if isinstance(model, Decoder) else None
        self._mark: _Mark | None = None

    def __enter__(self) -> Borrowed:
        """Mark the model. Raises ``ConfigError`` when another engine uses it."""
        if self.model is not None:
            mark: _Mark | None = self.model.__dict__.get(_MARK)
            user = mark.by() if mark else None
            if user is not None and user.model is self.model:  # not that of which this is a copy
                raise ConfigError("an engine is already using this model; shut it down first")
            attention = mark.attention if mark else self.model.config._attn_implementation
            self._mark = self.model.__dict__[_MARK] = _Mark(ref(self), attention)
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Make the model work with transformers alone again. Nothing when that was done."""
        if self.model is not None and self._mark is not None:
            self.model.set_attn_implementation(self._mark.attention)
            unpack(self.model)
            restore_layers(self.model)
            del self.model.__dict__[_MARK]
            self._mark = None
