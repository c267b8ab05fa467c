"""The engine's parameters from a body's fields, under the client's names; and the fields of vLLM
that bodies of every protocol may have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator

from ds_cp.api.requests.chat_body import MAX_TEMPLATE_KWARGS, checked_kwargs
from ds_cp.api.requests.engine_fields import EngineFields
from ds_cp.errors import RequestError
from ds_cp.sampling_params import SamplingParams

_TO_ENGINE = (
    "temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty"
).split()


class CommonRequest(EngineFields):
    """What the bodies of /v1/responses and /v1/messages share."""

    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=MAX_TEMPLATE_KWARGS)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _kwargs(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return checked_kwargs(value)

    def sampling(self, names: Mapping[str, str], **more: Any) -> SamplingParams:
        """The engine's parameters; see ``params_of``."""
        return params_of({name: getattr(self, name) for name in _TO_ENGINE} | more, names)


def params_of(given: Mapping[str, Any], names: Mapping[str, str] = {}) -> SamplingParams:
    """The engine's parameters; null fields take the engine's defaults, but for ``max_tokens``, of
    which null means as many as fit.

    ``top_p`` 0, which OpenAI allows and the engine does not, is greedy: the likeliest token alone.
    ``names``: the client's name of a parameter, where it differs. Raises ``RequestError`` with the
    client's names.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    greedy = fields.get("top_p") == 0
    if greedy:
        del fields["top_p"]
    try:
        params = SamplingParams(max_tokens=fields.pop("max_tokens", None), **fields)
        return replace(params, temperature=0.0) if greedy else params
    except RequestError as err:
        message = str(err)
        for ours, theirs in names.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        raise RequestError(message, names.get(err.param or "", err.param)) from None
