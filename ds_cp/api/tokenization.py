"""Text to token ids and back: in threads beside the event loop, bounded in size and time."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from threading import Event
from time import monotonic
from typing import Any, TypeVar

from ds_cp.api.chat.prompt import TemplateInput
from ds_cp.api.errors import ApiError, context_overflow
from ds_cp.api.lanes import Lanes, try_again
from ds_cp.engine.interface import EngineInterface
from ds_cp.errors import ChatTemplateError
from ds_cp.templates.chat import TOO_SLOW, Size
from ds_cp.templates.messages import ToolShape

CHARS_PER_TOKEN = 32  # characters of a text per token of the model's length, at most
READ_TOKENS = 4  # tokens of a long text per token of the model's length, at most
SHORT_CPU_S = 0.25  # seconds that a template computes in the lane of short texts
LONG_CHARS = 1 << 16  # characters of a text above which it takes the lane of long ones
LONG_TOKENS = 1 << 14  # as many tokens take that lane to become text
_HAVE = {"prompt": "has", "messages": "have"}
CUT_TOKENS = 16  # tokens by which cutting a text may raise its count, at each cut

Result = TypeVar("Result")

logger = logging.getLogger("ds_cp.api")


class TextCodec:
    """The tokenizer and the chat template of an engine behind a few threads.

    Each call ends within ``timeout_s`` seconds for the text and as much for the template, with a
    503 if need be. Short texts wait for neither long ones nor slow templates. A long text is given
    up between its pieces when nobody waits for it any more.
    """

    def __init__(self, engine: EngineInterface, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._texts = Lanes("text")
        self._templates = Lanes("template")

    def close(self) -> None:
        """Cancel the calls that wait for a thread; those in a thread end by themselves."""
        self._texts.close()
        self._templates.close()

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises ``ApiError`` 400 when its characters are too many, or its
        tokens more than ``READ_TOKENS`` times the model's length."""
        self._check_chars(len(text), "prompt")
        return await self._encode(text, add_special_tokens, "prompt")

    async def tool_shape(self) -> ToolShape:
        """What the model's template makes of tools. Raises ``ApiError`` as ``encode_chat``."""
        template, timeout_s = self._engine.chat_template, self._timeout_s
        if template.examined is not None:
            return template.examined.tools
        return await self._in_template_lane(lambda: template.tools(timeout_s), False, timeout_s)

    async def encode_chat(self, chat: TemplateInput) -> tuple[str, list[int]]:
        """A conversation through the model's own template, as text and as token ids. ``content`` of
        a message: a text, a list of text parts, or None.

        Raises ``ApiError`` 400 when the model has no template, the template refuses the messages or
        fails, or they are too long.
        """
        self._check_messages(len(chat.messages))
        with _as_400():
            chars = Size.of(chat.messages, chat.tools, chat.values).chars
        self._check_chars(chars, "messages")
        text = await self._render(chat, chars)
        # The template brings the special tokens, as in apply_chat_template(tokenize=True).
        return text, await self._encode(text, False, "messages")

    async def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        tokenizer = self._engine.tokenizer
        long = len(ids) > LONG_TOKENS
        return await self._in_text_lane(lambda _: _decode(tokenizer, ids), long, "tokens")

    def check_count(self, tokens: int) -> None:
        """Raises ``ApiError`` 400 for more token ids than the model is long."""
        if tokens > self._engine.info.max_model_len:
            raise self._too_long(f"{tokens} tokens were sent", "tokens")

    async def _render(self, chat: TemplateInput, chars: int) -> str:
        template = self._engine.chat_template
        most = CHARS_PER_TOKEN * self._engine.info.max_model_len
        deadline = monotonic() + self._timeout_s

        def render(long: bool) -> Awaitable[str]:
            left_s = max(deadline - monotonic(), 0.001)

            def work() -> str:
                return template.render(
                    chat.messages,
                    add_generation_prompt=chat.add_generation_prompt,
                    max_chars=most,
                    timeout_s=left_s,
                    cpu_s=None if long else SHORT_CPU_S,
                    tools=chat.tools,
                    values=chat.values,
                    continue_final=chat.continue_final,
                )

            return self._in_template_lane(work, long, left_s)

        try:
            return await render(chars > LONG_CHARS)
        except ApiError as err:
            if err.code != TOO_SLOW or chars > LONG_CHARS:
                raise
        return await render(True)  # anew, and not in the way of those that are quick

    async def _in_template_lane(
        self, work: Callable[[], Result], long: bool, timeout_s: float
    ) -> Result:
        try:
            with _as_400():
                return await self._templates.run(lambda _: work(), long=long, timeout_s=timeout_s)
        except TimeoutError:
            raise self._late("messages") from None
        except OSError as err:
            logger.error("the chat template cannot be rendered: %s", err)
            raise try_again(
                "the chat template cannot be rendered at the moment", "chat_template_unavailable"
            ) from None

    async def _in_text_lane(self, work: Callable[[Event], Result], long: bool, what: str) -> Result:
        try:
            return await self._texts.run(work, long=long, timeout_s=self._timeout_s)
        except TimeoutError:
            raise self._late(what) from None

    def _late(self, what: str) -> ApiError:
        return try_again(
            f"the {what} could not be tokenized within {self._timeout_s:g} s", "tokenize_timeout"
        )

    async def _encode(self, text: str, add_special_tokens: bool, what: str) -> list[int]:
        tokenizer, length = self._engine.tokenizer, self._engine.info.max_model_len
        most = READ_TOKENS * length
        ids = await self._in_text_lane(
            lambda stop: _encode_bounded(tokenizer, text, add_special_tokens, most, stop),
            len(text) > LONG_CHARS,
            what,
        )
        if ids is None:
            raise self._too_long(f"the {what} {_HAVE[what]} more than {most} tokens", what)
        return ids

    def _check_chars(self, chars: int, what: str) -> None:
        most = CHARS_PER_TOKEN * self._engine.info.max_model_len
        if chars > most:
            raise self._too_long(
                f"the {what} {_HAVE[what]} {chars} characters, of which at most {most} are read",
                what,
            )

    def _check_messages(self, count: int) -> None:
        if count > self._engine.info.max_model_len:
            raise self._too_long(f"there are {count} messages", "messages")

    def _too_long(self, however: str, param: str) -> ApiError:
        """As OpenAI says it, so that clients know it."""
        length = self._engine.info.max_model_len
        return context_overflow(
            f"This model's maximum context length is {length} tokens. However, {however}. "
            f"Please reduce the length of the {param}.",
            param,
        )


@contextmanager
def _as_400() -> Iterator[None]:
    """Answer what is wrong with a conversation or its template."""
    try:
        yield
    except ChatTemplateError as err:
        raise ApiError(400, str(err), param=err.param, code=err.code) from None


def _encode_bounded(
    tokenizer: Any, text: str, add_special_tokens: bool, most: int, stop: Event
) -> list[int] | None:
    """Token ids of a text; None when they are more than ``most``, or ``stop`` is set.

    A token takes a hundred bytes while a text is tokenized as a whole, which cannot be interrupted.
    So where a long text may have too many, they are counted in pieces first.
    """
    if len(text) > LONG_CHARS and not _must_fit(tokenizer, text, most):
        count = 0
        for piece in _pieces(text):
            if stop.is_set():
                return None
            count += len(_encode(tokenizer, piece, False)) - CUT_TOKENS
            if count > most:
                return None
    return None if stop.is_set() else _encode(tokenizer, text, add_special_tokens)


def _must_fit(tokenizer: Any, text: str, most: int) -> bool:
    """Whether a text has at most ``most`` tokens for sure: its bytes are no more. A token of the
    tokenizers library stands for a byte or more of the normalized text; of others nothing is known.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(text) > most:
        return False
    normalizer, size = backend.normalizer, 0
    for piece in _pieces(text):
        normal = piece if normalizer is None else normalizer.normalize_str(piece)
        size += len(normal.encode())
        if size > most:
            return False
    return True


def _pieces(text: str) -> Iterator[str]:
    return (text[begin : begin + LONG_CHARS] for begin in range(0, len(text), LONG_CHARS))


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
