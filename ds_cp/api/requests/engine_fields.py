"""The fields that every body has by which a model answers, whatever its protocol."""

from __future__ import annotations

from pydantic import Field, field_validator

from ds_cp.api.errors import FieldError
from ds_cp.api.requests.messages import plain_text
from ds_cp.api.requests.strict_model import StrictModel
from ds_cp.sampling_params import MAX_SALT_CHARS

MAX_MODEL_CHARS = 1024  # characters of a model's name


class EngineFields(StrictModel):
    """The protocols' own names of them, and those of vLLM; null means the default."""

    model: str | None = Field(None, max_length=MAX_MODEL_CHARS)
    stream: bool | None = None
    temperature: float | None = Field(None, description="0 is greedy; 0 to 2, default 1")
    top_p: float | None = Field(None, description="0 to 1, default 1; 0 is greedy")
    top_k: int | None = Field(None, description="0 or -1 keeps every token")
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, description="-2 to 2, default 0")
    frequency_penalty: float | None = Field(None, description="-2 to 2, default 0")
    repetition_penalty: float | None = Field(None, description="1 is none; above 0")
    priority: int | None = Field(None, description="lower numbers are served first; default 0")
    cache_salt: str | None = Field(None, description="keeps cached prefixes apart")

    @field_validator("cache_salt")
    @classmethod
    def _cache_salt(cls, value: str | None) -> str | None:
        if value is not None and len(value) > MAX_SALT_CHARS:
            raise FieldError(f"cache_salt has {len(value)} characters; at most {MAX_SALT_CHARS}")
        return value if value is None else plain_text(value, "cache_salt")
