"""Token ids to text, a piece at a time, with stop strings that may span tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from ds_cp.errors import RequestError
from ds_cp.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not a character yet
KEPT = 4  # tokens before the next one that are decoded with it; a character spans at most 4
WINDOW = 8  # tokens that are decoded at once, at most, before the window shrinks to KEPT
CUTS = 4  # places where a window may be cut: one of 4 neighbours is where a character begins


class Detokenizer:
    """A tokenizer's decode, and what it does with single tokens, looked up once per engine.

    ``tokenizer``: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(special.union(tokenizer.all_special_ids))
        self._byte_of = self._byte_tokens()
        # A token that is one printable character, where there are byte tokens.
        self.letter = next((t for t, byte in self._byte_of.items() if byte == ord("a")), -1)

    def start(
        self,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        kept: AbstractSet[int] = frozenset(),
    ) -> IncrementalDetokenizer:
        """The text of an answer to ``prompt``. ``kept``: special tokens that are text all the
        same."""
        skipped = self._special - kept if skip_special_tokens else frozenset()
        return IncrementalDetokenizer(self, prompt, stop, skipped)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def is_unknown(self, token: int) -> bool:
        """Whether a token is a row of the model's head that the tokenizer does not know."""
        return self._tokenizer.convert_ids_to_tokens(token) is None

    def byte(self, token: int) -> int | None:
        """The byte that a token such as ``<0xE2>`` stands for, where the tokenizer falls back to
        bytes for characters it does not know."""
        return self._byte_of.get(token)

    def _byte_tokens(self) -> dict[int, int]:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = self._tokenizer.convert_tokens_to_ids(names)
        if None in ids or self._tokenizer.convert_ids_to_tokens(ids) != names:
            return {}  # an unknown name gives the unknown token's id, or None
        letter = ids[ord("a")]
        return {id_: byte for byte, id_ in enumerate(ids)} if self.decode([letter]) == "a" else {}


class IncrementalDetokenizer:
    """Text of one answer as its tokens arrive: what they add to the text of the prompt before them.

    ``push`` returns text once it can no longer change: not while its last character lacks bytes,
    and not while its end could be the beginning of a stop string. The work per token is bounded.
    """

    def __init__(
        self,
        tokens: Detokenizer,
        prompt: Sequence[int],
        stop: Sequence[str],
        skipped: AbstractSet[int],
    ) -> None:
        self._tokens = tokens
        self._stop = tuple(stop)
        self._skipped = skipped  # tokens that decoding passes over
        self._ids: list[int] = []  # the last tokens, of the prompt too: decoders strip a beginning
        self._seen = 0  # characters of their text that are the prompt's or decoded already
        self._tail = ""  # the last character of their text, while it may lack bytes
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")  # of byte tokens
        self._held = ""  # decoded, not returned
        self._early = 0  # characters of _held that came too early to end a stop string
        self.length = 0  # characters decoded, returned or not
        self.stopped_by: str | None = None
        self._in_prompt = False  # the unfinished character began in the prompt
        self._prime(prompt)

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token; returns the text that is now certain. Sets ``stopped_by`` on a stop string,
        unless it is too early to stop."""
        return self._give(self._add(token), may_stop)

    def flush(self, may_stop: bool = True) -> str:
        """The rest of the text, when no token follows."""
        text = self._give(self._end_tail() + self._end_bytes(), may_stop)
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _prime(self, prompt: Sequence[int]) -> None:
        """Use the end of the prompt as context, with the bytes of its unfinished character."""
        words: list[int] = []
        run: list[int] = []  # the bytes after the last word, and some before it
        for token in reversed(prompt):
            if self._leaves_out(token):
                continue
            byte = self._tokens.byte(token)
            if byte is None:
                words.append(token)
            elif not words:
                run.append(byte)
            if len(words) == WINDOW:
                break
        if run and not words:
            self._anchor()
        elif words:
            self._ids = words[::-1]
            self._read()
        if run:
            self._end_tail()
            self._bytes.decode(bytes(run[::-1]))
        self._in_prompt = bool(self._tail or self._bytes.getstate()[0])

    def _leaves_out(self, token: int) -> bool:
        return token in self._skipped or self._tokens.is_unknown(token)

    def _add(self, token: int) -> str:
        """The text that is certain with one more token."""
        if self._leaves_out(token):
            return ""
        byte = self._tokens.byte(token)
        if byte is None:
            text = self._end_bytes()
            self._ids.append(token)
            return text + self._read()
        text = self._end_tail()
        if not self._ids:  # a decoder may strip a blank at the beginning
            self._anchor()
            if not self._tokens.decode([token]):
                return text
        return text + self._bytes.decode(bytes([byte]))

    def _read(self) -> str:
        """What the window's text has beyond ``_seen``, without a last character that may change."""
        now = self._tokens.decode(self._ids)
        self._tail = REPLACEMENT if now.endswith(REPLACEMENT) else ""
        end = len(now) - len(self._tail)
        text, self._seen = now[self._seen : end], max(self._seen, end)
        if len(self._ids) > WINDOW:
            self._shrink(now)
        return text

    def _shrink(self, now: str) -> None:
        """Drop the oldest tokens, where those that stay spell the end of the same text."""
        for kept in range(KEPT, KEPT + CUTS):
            text = self._tokens.decode(self._ids[-kept:])
            seen = self._seen - (len(now) - len(text))
            if seen > 0 and now.endswith(text):
                break
        else:
            if len(self._ids) <= 4 * WINDOW:
                return  # try again with the next token
            seen = len(text) - len(self._tail)
        self._ids, self._seen = self._ids[-kept:], seen

    def _anchor(self) -> None:
        """A letter as context: after bytes that are text, no token is the first."""
        self._ids = [self._tokens.letter]
        self._seen = 1

    def _end_tail(self) -> str:
        """The window's last character, which stays as it is."""
        text, self._tail = self._tail, ""
        self._seen += len(text)
        return text

    def _end_bytes(self) -> str:
        """What is left of a character of byte tokens that ends too early."""
        return self._bytes.decode(b"", final=True)

    def _give(self, text: str, may_stop: bool) -> str:
        """Append ``text`` to the held text; return its part that cannot begin a stop string."""
        if self._in_prompt and text:
            # Of a character that stays unfinished the prompt's own text has the sign already.
            self._in_prompt, text = False, text.removeprefix(REPLACEMENT)
        self.length += len(text)
        if self.stopped_by is not None:
            return ""
        self._held += text
        found = [
            (at, s)
            for s in self._stop
            if (at := self._held.find(s, max(0, self._early + 1 - len(s)))) >= 0
        ]
        if found and may_stop:
            at, self.stopped_by = min(found)
            out, self._held = self._held[:at], ""
            return out
        if not may_stop:
            self._early = len(self._held)
        keep = max((self._overlap(s) for s in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._early = max(0, self._early - len(out))
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def start_text(
    detokenizer: Detokenizer | None, prompt: Sequence[int], params: SamplingParams
) -> IncrementalDetokenizer | None:
    """The text of a new answer, where there is a tokenizer. Raises ``RequestError`` when that does
    not decode the prompt."""
    if detokenizer is None:
        return None
    try:
        return detokenizer.start(
            prompt, params.stop, params.skip_special_tokens, params.kept_special_tokens
        )
    except Exception as err:  # whatever a tokenizer raises concerns this request alone
        raise RequestError(
            f"the tokenizer cannot decode the prompt ({type(err).__name__}: {err})", "prompt"
        ) from err
