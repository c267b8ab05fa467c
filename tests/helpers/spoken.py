"""A fake engine that says what a test wants, and a chat template with tools and reasoning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from ds_cp.outputs import Delta, TokenLogprob
from ds_cp.sampling_params import RequestOptions, SamplingParams
from tests.helpers.fake_engine import FakeEngine, make_tokenizer

PIECE = 3  # characters of a delta
MODEL_LEN = 8192  # tokens
# In the style of Qwen: calls are JSON in tags, reasoning is between tags.
TEMPLATE = (
    "{%- if tools %}<|system|>Tools: {% for t in tools %}{{ t | tojson }}{% endfor %} "
    'Call them as <tool_call>{"name": ..., "arguments": ...}</tool_call><|end|>{% endif %}'
    "{%- for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{%- if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{%- else %}{{ m.content or '' }}{% endif %}"
    "{%- for c in m.tool_calls or [] %}<tool_call>"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>"
    "{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{%- endif %}"
)


class SpokenEngine(FakeEngine):
    """Answers with the texts of ``say`` in turn, the last one again and again, in pieces of
    ``PIECE`` characters, each of one token. ``max_tokens`` cuts an answer; a stop string ends it.
    """

    def __init__(self, *say: str) -> None:
        super().__init__(make_tokenizer(TEMPLATE), MODEL_LEN)
        self.info = replace(
            self.info, kv_capacity_tokens=2 * MODEL_LEN, largest_request_tokens=MODEL_LEN
        )
        self.say = list(say)

    def renew(self, *say: str) -> None:
        """As it was made, with other texts."""
        self.say = list(say)
        self.delay_s = self.first_delay_s = 0.0
        self.refuse = self.break_after = self.cached = None
        for record in (self.seen, self.options, self.aborted):
            record.clear()

    @property
    def prompts(self) -> list[str]:
        """The prompts so far, as text."""
        return [self.tokenizer.decode(ids) for ids, _ in self.seen]

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),  # noqa: B008 (frozen)
    ) -> AsyncIterator[Delta]:
        self.seen.append((prompt_token_ids, params))
        self.options.append(options)
        if self.refuse is not None:
            raise self.refuse
        text = self.say.pop(0) if len(self.say) > 1 else self.say[0]
        reason, stop_reason = "stop", None
        for stop in params.stop:
            if stop in text:
                text, stop_reason = text[: text.index(stop)], stop
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)] or [""]
        if params.max_tokens is not None and len(pieces) > params.max_tokens:
            pieces, reason, stop_reason = pieces[: params.max_tokens], "length", None
        self.live.add(request_id)
        whole = False
        try:
            offset = 0
            for number, piece in enumerate(pieces):
                await asyncio.sleep(self.delay_s + (self.first_delay_s if not number else 0.0))
                if self.break_after is not None and number == self.break_after[0]:
                    raise self.break_after[1]
                last = number + 1 == len(pieces)
                logprobs = None
                if params.logprobs is not None:
                    top = tuple((i, -1.0 - i) for i in range(params.logprobs))
                    logprobs = (TokenLogprob(9, -0.5, top, offset),)
                offset += len(piece)
                whole = last
                yield Delta(
                    request_id,
                    (9,),
                    piece,
                    logprobs,
                    reason if last else None,
                    stop_reason if last else None,
                    cached_tokens=self.cached if not number else None,
                )
        finally:
            self.live.discard(request_id)
            if not whole and request_id not in self.aborted:
                self.aborted.append(request_id)
