"""What the adapters check of a conversation before it is a chat."""

from __future__ import annotations

from collections.abc import Sequence

from ds_cp.api.chat.request import Turn, first_unasked
from ds_cp.api.errors import ApiError, shown


def check_answers(turns: Sequence[Turn], field: str, kind: str) -> None:
    """Every result answers a call of an earlier turn. ``field``: the body's; ``kind``: what the
    protocol calls a result. Raises ``ApiError`` 400."""
    index = first_unasked(turns)
    if index is not None:
        raise ApiError(
            400,
            f"{field}: a {kind} answers the call {shown(turns[index].answers)}, and no earlier "
            "message makes a call with this id",
            param=field,
            code="invalid_value",
        )
