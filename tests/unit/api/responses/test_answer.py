"""What an answer that is kept until its end is charged for."""

from __future__ import annotations

import tracemalloc
from typing import Any

from ds_cp.api.answers.logprobs import CHAT_ENTRY_BYTES, chat_entries
from ds_cp.api.responses.answer import _kept_bytes
from ds_cp.api.responses.items import text_item
from ds_cp.api.responses.store import size_of
from ds_cp.outputs import Delta, TokenLogprob

TOP = 20


class Texts:
    """Tokens of four bytes, which few are longer than."""

    def piece(self, token_id: int) -> tuple[str, bytes]:
        return "abcd", b"abcd"


def test_log_probabilities_are_charged_what_they_take() -> None:
    top = tuple((i, -1.0 - i) for i in range(TOP))
    logprobs = tuple(TokenLogprob(9, -0.5, top, 0) for _ in range(200))
    texts: Any = Texts()
    tracemalloc.start()
    try:
        kept = chat_entries(logprobs, texts, TOP)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == 200
    charged = _kept_bytes(Delta("r", (9,) * 200, "", logprobs, None))
    assert charged == 200 * (TOP + 1) * CHAT_ENTRY_BYTES
    assert taken <= charged <= 2 * taken
    item = text_item("assistant", "a")
    item["content"][0]["logprobs"] = kept
    assert charged <= size_of(item, 1 << 30, [item]) <= charged + 4000
    assert size_of(item, 1 << 30) > charged  # as it would be found by going through all
