"""What answers by a schema are, in the scripts of clients that bring pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Person(BaseModel):
    """Every part of it ends, so that an answer does, whatever the model."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"]
