"""What the adapters check of a conversation before it is a chat."""

from __future__ import annotations

from collections.abc import Sequence

from ds_cp.api.chat.request import Turn
from ds_cp.api.context import engine_salt
from ds_cp.api.errors import ApiError, shown
from ds_cp.api.requests.sampling import CommonRequest
from ds_cp.sampling_params import RequestOptions


def check_answers(turns: Sequence[Turn], field: str, kind: str) -> None:
    """Every result answers a call of an earlier turn. ``field``: the body's; ``kind``: what the
    protocol calls a result. Raises ``ApiError`` 400."""
    asked: set[str] = set()
    for turn in turns:
        asked.update(call.id for call in turn.calls)
        if turn.role == "tool" and turn.answers not in asked:
            raise ApiError(
                400,
                f"{field}: a {kind} answers the call {shown(turn.answers)}, and no earlier message "
                "makes a call with this id",
                param=field,
                code="invalid_value",
            )


def options_of(body: CommonRequest, key_digest: str | None, client: str) -> RequestOptions:
    """Priority and cache salt of a request. ``key_digest``: of its API key; ``client``: as in
    ``RequestOptions``. Raises ``RequestError``."""
    return RequestOptions(
        priority=0 if body.priority is None else body.priority,
        cache_salt=engine_salt(key_digest, body.cache_salt or ""),
        client=client,
    )
