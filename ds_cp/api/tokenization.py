"""Text to token ids and back: in threads beside the event loop, bounded in size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from ds_cp.api.errors import ApiError
from ds_cp.engine.interface import EngineInterface
from ds_cp.text import shorten

CHARS_PER_TOKEN = 32  # characters of a text per token of the model's length, at most
THREADS = 2  # texts that are tokenized at once
MAX_REASON_CHARS = 200  # characters of a chat template's refusal in a message

Result = TypeVar("Result")


class TextCodec:
    """The tokenizer of an engine behind a small pool of threads.

    Each call ends within ``timeout_s`` seconds, with a 503 if need be. Its thread works on to the
    end of the text, so slow texts can occupy this pool but nothing else.
    """

    def __init__(self, engine: EngineInterface, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ds_cp-text")

    def close(self) -> None:
        """Cancel the calls that wait for a thread; those in a thread end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises ``ApiError`` 400 when its characters are too many."""
        self._check_length(len(text))
        return await self._run(
            partial(_encode, self._engine.tokenizer, text, add_special_tokens), "the prompt"
        )

    async def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, through the model's own template.

        Raises ``ApiError`` 400 when the model has none, refuses the messages, or they are too long.
        """
        tokenizer = self._engine.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        texts = _as_text(messages)
        self._check_length(sum(len(message["content"]) for message in texts))
        render = partial(_render, tokenizer, texts, add_generation_prompt)
        text = await self._run(render, "the messages")
        self._check_length(len(text))
        # The template brings the special tokens, as in apply_chat_template(tokenize=True).
        return await self._run(partial(_encode, tokenizer, text, False), "the messages")

    async def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return await self._run(partial(_decode, self._engine.tokenizer, ids), "the tokens")

    def _check_length(self, chars: int) -> None:
        length = self._engine.info.max_model_len
        if chars > CHARS_PER_TOKEN * length:
            raise ApiError(
                400,
                f"the prompt has {chars} characters; for a model length of {length} tokens "
                f"at most {CHARS_PER_TOKEN * length} are read",
                code="context_length_exceeded",
            )

    async def _run(self, work: Callable[[], Result], what: str) -> Result:
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            done, _ = await asyncio.wait({future}, timeout=self._timeout_s)
        except asyncio.CancelledError:
            future.cancel()
            raise
        if not done:
            future.cancel()
            raise ApiError(
                503,
                f"{what} could not be tokenized within {self._timeout_s:g} s; try again",
                code="tokenize_timeout",
                headers={"Retry-After": "1"},
            )
        return future.result()


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The messages with their parts joined by a line break."""
    return [
        message
        if isinstance(message["content"], str)
        else message | {"content": "\n".join(part["text"] for part in message["content"])}
        for message in messages
    ]


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as err:  # its text is the template author's, by raise_exception
        reason = shorten(str(err), MAX_REASON_CHARS)
        raise ApiError(
            400, f"the model's chat template refuses these messages: {reason}", param="messages"
        ) from None
    return text
