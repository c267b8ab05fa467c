"""Log-probabilities in OpenAI's shapes: offsets of tokens that a text has not, and infinities."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from ds_cp.api.answers import logprobs
from ds_cp.api.answers.logprobs import TokenTexts, chat_entries
from ds_cp.outputs import TokenLogprob


def test_offsets_with_tokens_that_the_text_has_not() -> None:
    """Added tokens, dropped blanks, and blanks that a tokenizer adds have no width."""
    pieces = {1: "<s>", 2: " foo", 3: " foo", 4: "bar"}
    texts: Any = SimpleNamespace(
        piece=lambda i: (pieces[i], pieces[i].encode()), label=lambda i: pieces[i]
    )
    scores = [None, *(TokenLogprob(i, -1.0) for i in (2, 3, 4))]
    parts = list(logprobs.echo_blocks([1, 2, 3, 4], scores, "foo foo   bar", texts, 0))
    assert [text for text, _ in parts] == ["foo foo   bar"]
    assert parts[0][1]["text_offset"] == [0, 0, 3, 7]


def test_nan_logprob_is_not_sent_as_nan() -> None:
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda i: "a", decode=lambda ids, **_: "a")
    texts = TokenTexts(SimpleNamespace(tokenizer=tokenizer))  # type: ignore[arg-type]
    entry = chat_entries([TokenLogprob(1, -math.inf, ((2, -math.inf),))], texts, 1)[0]
    assert entry["logprob"] == -9999.0 and entry["top_logprobs"][0]["logprob"] == -9999.0
