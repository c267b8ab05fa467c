"""The state of a constrained answer: which tokens may come next. Over llguidance.

A ``Compiler`` knows the vocabulary; ``compile`` gives a ``Matcher``, at the beginning of an answer.
Masks follow from the grammar's text, the vocabulary and the tokens so far alone, so that any rank
can make the state again.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ds_cp.grammar import limits
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.text import shorten

MAX_REASON_CHARS = 300  # characters of an error's reason
_EXCERPT = re.compile(r"[0-9]+ \||\^+$|\(\?|<backtrace>")
_PLACE = re.compile(r"^at [0-9]+\([0-9]+\): ")


class GrammarError(ValueError):
    """A grammar that is none, or that needs more than the bounds, in one line."""


class _Tokens:
    """A vocabulary as llguidance takes it. It is never asked to tokenize: the grammars say
    ``no_forcing``. Its end token is one beyond the vocabulary: which tokens end an answer is the
    request's own."""

    is_tokenizer_wrapper = True
    eos_token_id = None
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens()
        self.special_token_ids = list(vocabulary.special)

    def __call__(self, text: str) -> list[int]:
        raise GrammarError("this vocabulary does not tokenize")


class Compiler:
    """Compiles grammars for one vocabulary, and keeps the last ones. For one thread at a time."""

    def __init__(self, vocabulary: Vocabulary, kept: int = limits.KEPT_GRAMMARS) -> None:
        self._tokenizer = LLTokenizer(_Tokens(vocabulary))  # type: ignore[arg-type]
        self._limits = LLParserLimits(
            max_items_in_row=limits.ROW_ITEMS,
            initial_lexer_fuel=limits.INITIAL_FUEL,
            step_lexer_fuel=limits.STEP_FUEL,
            step_max_items=limits.STEP_ITEMS,
            max_lexer_states=limits.LEXER_STATES,
            max_grammar_size=limits.GRAMMAR_SYMBOLS,
            verbose_errors=False,
        )
        self._kept = kept
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # the last used at the end

    def compile(self, source: str) -> Matcher:
        """The beginning of an answer under the grammar. Raises ``GrammarError``."""
        found = self._compiled.pop(source, None)
        if found is None:
            found = LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
            if found.is_error():
                raise GrammarError(reason_of(found.get_error()))
        self._compiled[source] = found
        while len(self._compiled) > self._kept:
            self._compiled.popitem(last=False)
        return Matcher(found.deep_copy(), self._tokenizer.vocab_size - 1)


class Matcher:
    """One answer's state. After an error it stays in it: every ``allowed`` raises."""

    def __init__(self, inner: LLMatcher, own_end: int) -> None:
        self._inner = inner
        self._own_end = own_end  # the library's end token: none of the vocabulary
        self._ended = False  # an end token came: nothing counts any more
        self.num_tokens = 0  # of the answer so far

    def advance(self, tokens: Sequence[int], ends: AbstractSet[int]) -> None:
        """Take the answer's next tokens. One of ``ends`` ends it."""
        self.num_tokens += len(tokens)
        if self._ended:
            return
        at = next((at for at, token in enumerate(tokens) if token in ends), None)
        self._ended = at is not None
        if taken := list(tokens[:at]):
            self._inner.consume_tokens(taken)

    def allowed(self, ends: AbstractSet[int]) -> bytes:
        """The tokens that may come next: bit ``i % 8`` of byte ``i // 8`` for token i; none beyond.
        ``ends`` may come where the answer may end, and only there.

        Raises ``GrammarError`` when the grammar needs more than the bounds of one step, when it did
        not allow a token that came, or when no token can come.
        """
        inner = self._inner
        mask = bytearray(max(ends, default=0) // 8 + 1)
        may_end = True
        if not self._ended:
            if not inner.is_stopped():
                found = bytearray(inner.compute_bitmask())
                found[self._own_end // 8] &= ~(1 << self._own_end % 8)
                mask = found.ljust(len(mask), b"\0")
            if inner.is_error():
                raise GrammarError(reason_of(inner.get_error()))
            may_end = inner.is_accepting()
        for token in ends:
            if may_end:
                mask[token // 8] |= 1 << token % 8
            else:
                mask[token // 8] &= ~(1 << token % 8)
        if not any(mask):
            raise GrammarError("no token of the vocabulary can come next")
        return bytes(mask)


def reason_of(error: str) -> str:
    """The library's error in one line, without its excerpts of the grammar."""
    error = error.partition("<state>")[0].replace("<non-verbose/>", "")
    lines = [line.strip() for line in error.splitlines()]
    told = [line for line in lines if line and not _EXCERPT.match(line)]
    return shorten(_PLACE.sub("", " ".join(told)), MAX_REASON_CHARS) or "it is no grammar"
