"""What answers by a schema are, in the scripts of clients that bring pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Person(BaseModel, extra="forbid"):
    """Every part of it ends and there are no others, so an answer ends too, whatever the model."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"]
