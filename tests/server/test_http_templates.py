"""Chat templates and the bounds of texts, as a client meets them."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from tokenizers import normalizers

from ds_cp.api.lanes import MAX_WAITING, Lanes
from ds_cp.api.tokenization import LONG_CHARS, TextCodec
from tests.helpers import chat_templates as templates
from tests.helpers.fake_engine import FakeEngine, make_tokenizer
from tests.server.conftest import Running, error_of

CHAT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/tokenize", "/detokenize"
HELLO = [{"role": "user", "content": "hello world"}]


def serving(launch: Any, template: Any, **settings: Any) -> Running:
    server: Running = launch(FakeEngine(make_tokenizer(template)), **settings)
    return server


def prompt_of(server: Running, messages: Any) -> str:
    """What the model sees of a conversation, through /tokenize and /detokenize."""
    ids = server.post(TOKENIZE, {"messages": messages}).json()["tokens"]
    text: str = server.post(DETOKENIZE, {"tokens": ids}).json()["prompt"]
    return text


def test_parts_reach_a_template_that_walks_over_them(launch: Any) -> None:
    server = serving(launch, templates.PARTS)
    assert "hello world" in prompt_of(server, HELLO)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello world"}]}]
    assert prompt_of(server, parts) == prompt_of(server, HELLO)
    assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "chat_template_error",
         "fails on these messages: TypeError: can only concatenate str"),
        ("{{ messages[0].role }}", "chat_template_error", "leaves out what the user says"),
        ("{{ raise_exception('only on Sundays') }}", "chat_template_refused",
         "refuses these messages: only on Sundays"),
        ("{% if %}", "chat_template_error", "does not compile: line 1"),
        (" ", "no_chat_template", "is empty"),
        ({"rag": "x", "tool_use": "y"}, "no_chat_template", "none called 'default'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
def test_a_template_at_fault_is_named(
    launch: Any, path: str, template: Any, code: str, words: str
) -> None:
    server = serving(launch, template)
    error = error_of(server.post(path, {"messages": HELLO}), 400)
    assert words in error["message"] and "chat template" in error["message"]
    assert (error["param"], error["code"]) == ("messages", code)
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_of_several_templates_the_default_is_used(launch: Any) -> None:
    server = serving(launch, {"tool_use": "x", "default": templates.CHATML})
    assert "<|im_start|>user\nhello world<|im_end|>" in prompt_of(server, HELLO)


def begins(error: dict[str, Any], length: int = 128) -> bool:
    words = f"This model's maximum context length is {length} tokens. However, "
    said: str = error["message"]
    return said.startswith(words) and error["code"] == "context_length_exceeded"


def test_texts_are_bounded_by_the_models_length(served: Running) -> None:
    most = 32 * 128
    assert served.post(TOKENIZE, {"prompt": "a" * most}).status_code == 200
    for path, body, param in (
        (TOKENIZE, {"prompt": "a" * (most + 1)}, "prompt"),
        ("/v1/completions", {"prompt": "a" * (most + 1)}, "prompt"),
        (TOKENIZE, {"messages": [{"role": "user", "content": "a" * (most + 1)}]}, "messages"),
        (CHAT, {"messages": HELLO * 129}, "messages"),
    ):
        error = error_of(served.post(path, body), 400)
        assert begins(error) and error["param"] == param, error
    assert served.post(DETOKENIZE, {"tokens": [5] * 128}).status_code == 200
    error = error_of(served.post(DETOKENIZE, {"tokens": [5] * 128 + [10**9]}), 400)
    assert begins(error) and "129 tokens were sent" in error["message"]
    assert error["param"] == "tokens"


class Counting:
    """A tokenizer of one token a character, which notes what it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.given.append(len(text))
        return {"input_ids": [5] * len(text)}


def codec_over(tokenizer: Any, length: int, timeout_s: float = 10.0) -> TextCodec:
    engine = FakeEngine(make_tokenizer(), max_model_len=length)
    engine.tokenizer = tokenizer
    return TextCodec(engine, timeout_s)


def test_the_tokens_of_a_long_text_are_counted_first() -> None:
    counting = Counting()
    codec = codec_over(counting, length=LONG_CHARS)
    fits = "a" * (4 * LONG_CHARS)
    assert len(asyncio.run(codec.encode(fits))) == len(fits)
    assert counting.given == [LONG_CHARS] * 4 + [len(fits)]
    counting.given.clear()
    with pytest.raises(Exception, match="more than 262144 tokens") as caught:
        asyncio.run(codec.encode("a" * (30 * LONG_CHARS)))
    assert caught.value.code == "context_length_exceeded"  # type: ignore[attr-defined]
    assert counting.given == [LONG_CHARS] * 5  # the rest was not looked at
    codec.close()


@pytest.mark.parametrize(
    ("normalizer", "text", "counted"),
    [
        (None, "a" * 4 * LONG_CHARS, False),
        (None, "\xe9" * 2 * LONG_CHARS, False),  # two bytes
        (None, "\xe9" * 3 * LONG_CHARS, True),
        (normalizers.NFKC(), "a" * 4 * LONG_CHARS, False),
        (normalizers.NFKC(), "\ufdfa" * (LONG_CHARS + 1), True),  # becomes 18 characters
    ],
)
def test_a_long_text_that_must_fit_is_not_counted(
    normalizer: Any, text: str, counted: bool
) -> None:
    class Noting(Counting):
        backend_tokenizer = make_tokenizer().backend_tokenizer

    Noting.backend_tokenizer.normalizer = normalizer
    noting = Noting()
    codec = codec_over(noting, length=LONG_CHARS)
    asyncio.run(codec.encode(text))
    assert (noting.given == [len(text)]) != counted
    codec.close()


def test_two_long_texts_are_tokenized_at_once() -> None:
    both = threading.Barrier(2, timeout=20)

    class Meeting(Counting):
        def __call__(self, text: str, **rest: Any) -> dict[str, list[int]]:
            both.wait()
            return super().__call__(text, **rest)

    codec = codec_over(Meeting(), length=LONG_CHARS, timeout_s=20)

    async def two() -> None:
        text = "a" * (LONG_CHARS + 1)
        await asyncio.gather(codec.encode(text), codec.encode(text))

    asyncio.run(two())
    codec.close()


def test_a_long_text_that_is_late_is_given_up() -> None:
    go_on = threading.Event()

    class Slow(Counting):
        def __call__(self, text: str, **rest: Any) -> dict[str, list[int]]:
            super().__call__(text, **rest)
            go_on.wait(60)
            return {"input_ids": []}

    slow = Slow()
    codec = codec_over(slow, length=LONG_CHARS, timeout_s=0.25)

    async def give_up() -> None:
        try:
            with pytest.raises(Exception, match=r"within 0\.25 s"):
                await codec.encode("a" * (30 * LONG_CHARS))
        finally:
            go_on.set()

    asyncio.run(give_up())
    time.sleep(0.3)  # in which the others would come
    assert len(slow.given) <= 2
    codec.close()


def test_the_line_before_a_lane_is_bounded() -> None:
    async def fill() -> None:
        lanes = Lanes("test")
        go = threading.Event()

        def wait(_: threading.Event) -> bool:
            return go.wait(20)

        def run(long: bool) -> Any:
            return lanes.run(wait, long=long, timeout_s=20)

        waiting = [asyncio.create_task(run(True)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(Exception, match="wait to be tokenized; try again") as caught:
            await run(True)
        assert caught.value.status_code == 503  # type: ignore[attr-defined]
        short = asyncio.create_task(run(False))
        go.set()
        assert await short
        assert all(await asyncio.gather(*waiting))
        assert await run(True)  # there is room again
        lanes.close()

    asyncio.run(fill())
