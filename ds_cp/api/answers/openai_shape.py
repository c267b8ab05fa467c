"""What OpenAI's chat and text completions have around their choices."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from time import time
from typing import Any

from ds_cp.api.answers.json_pieces import json_array
from ds_cp.api.answers.logprobs import TokenTexts, prompt_items
from ds_cp.api.answers.respond import Json, Prompt


class Envelope:
    """Id, time and model of one answer."""

    def __init__(self, prefix: str, model: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time())  # seconds since the epoch
        self._model = model

    def head(self, kind: str) -> Json:
        """The first fields of an answer or a chunk."""
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}


def usage_of(prompts: Sequence[Prompt], completion_tokens: int) -> Json:
    """Token counts; cached tokens are those found in the prefix cache."""
    tokens = sum(len(prompt.ids) for prompt in prompts)
    cached = sum(prompt.cached_tokens for prompt in prompts)
    return {
        "prompt_tokens": tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def ending(reason: str | None = None, stop_reason: int | str | None = None) -> Json:
    """Why a choice ended; both fields are null before that."""
    return {"finish_reason": reason, "stop_reason": stop_reason}


def prompt_logprobs(prompt: Prompt, texts: TokenTexts, top: int | None) -> dict[str, Any]:
    """vLLM's field ``prompt_logprobs``, or nothing when the client did not ask for it."""
    if top is None:
        return {}
    return {"prompt_logprobs": json_array(prompt_items(prompt.logprobs, texts, top))}
