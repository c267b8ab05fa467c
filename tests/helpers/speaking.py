"""An engine that says a given text, token by token, as a real one would detokenize it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from ds_cp.engine.detokenize import Detokenizer
from ds_cp.outputs import Delta, TokenLogprob
from ds_cp.sampling_params import RequestOptions, SamplingParams
from tests.helpers.fake_engine import FakeEngine, make_tokenizer


def tokenizer_with(template: str | None, special: Sequence[str] = ()) -> Any:
    """The fake engine's tokenizer, with these special tokens besides."""
    tokenizer = make_tokenizer(template)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


class Speaking(FakeEngine):
    """Answer i is ``says[i % len(says)]``; special tokens in it are such tokens. It ends by itself,
    or at ``max_tokens``."""

    def __init__(self, template: str | None, special: Sequence[str] = (), *says: str) -> None:
        super().__init__(tokenizer_with(template, special), 8192)
        self.says = list(says)
        self._detokenizer = Detokenizer(self.tokenizer)

    def prompt(self, index: int = -1) -> str:
        """The text of a request's prompt."""
        return str(self.tokenizer.decode(self.seen[index][0]))

    def ids_of(self, text: str) -> list[int]:
        """Token ids of an answer."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),  # noqa: B008 (frozen)
    ) -> AsyncIterator[Delta]:
        self.seen.append((prompt_token_ids, params))
        answers = [self.ids_of(self.says[i % len(self.says)]) for i in range(params.n)]
        texts = [
            self._detokenizer.start(
                prompt_token_ids, params.stop, params.skip_special_tokens,
                params.kept_special_tokens,
            )
            for _ in answers
        ]  # fmt: skip
        for step in range(max(map(len, answers)) + 1):
            for index, ids in enumerate(answers):
                if step > len(ids) or (params.max_tokens and step >= params.max_tokens):
                    continue
                text, reason = texts[index], None
                offset = text.length
                if step == len(ids):  # the end token, which is no text
                    token, said, reason = 0, text.flush(), "stop"
                else:
                    token = ids[step]
                    said = text.push(token)
                    if step + 1 == params.max_tokens:
                        said, reason = said + text.flush(), "length"
                logprobs = None
                if params.logprobs is not None:
                    logprobs = (TokenLogprob(token, -0.5, ((token, -0.5),), offset),)
                yield Delta(
                    request_id, (token,), said, logprobs, reason, index=index,
                    cached_tokens=0 if step == index == 0 else None,
                )  # fmt: skip
