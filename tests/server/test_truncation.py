"""``truncation`` of /v1/responses, with the openai client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.conftest import Running

Launch = Callable[..., Running]


def talk(turns: int, words: int) -> list[Any]:
    said: list[Any] = [{"role": "developer", "content": "keep this"}]
    for number in range(turns):
        said.append({"role": "user", "content": f"ask {number} " + "many " * words})
        said.append({"role": "assistant", "content": f"said {number}"})
    return [*said, {"role": "user", "content": "and now?"}]


def prompt_of(server: Running) -> str:
    return str(server.engine.prompts[-1])  # type: ignore[attr-defined]


def test_auto_leaves_out_the_beginning(spoken: Launch) -> None:
    server = spoken("ok")
    create = server.client().responses.create
    most = server.engine.info.max_model_len
    given: dict[str, Any] = {"model": "fake-model", "max_output_tokens": 8}
    for turns, words in ((40, most // 40), (3, most // 2), (600, 4)):
        items = talk(turns, words)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            create(input=items, **given)
        reply = create(input=items, truncation="auto", instructions="be brief", **given)
        assert reply.output_text == "ok" and reply.truncation == "auto"
        prompt = prompt_of(server)
        assert "be brief" in prompt and "keep this" in prompt and "and now?" in prompt
        assert reply.usage.input_tokens + 8 <= most
        numbers = [n for n in range(turns) if f"ask {n} " in prompt]
        assert numbers == list(range(turns - len(numbers), turns))
        assert all((f"said {n}<" in prompt) == (n in numbers) for n in range(turns))
    # The rest is as long as it can be: one turn more, or two, would not fit.
    left_out = talk(600, 4)[-2 * len(numbers) - 5 :]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        create(input=[talk(1, 1)[0], *left_out], instructions="be brief", **given)


def test_what_is_kept_goes_on_whole(spoken: Launch) -> None:
    """The store has the whole conversation, of which each answer leaves out what it must."""
    server = spoken("ok")
    create = server.client().responses.create
    most = server.engine.info.max_model_len
    given: dict[str, Any] = {"model": "fake-model", "truncation": "auto", "max_output_tokens": 4}
    first = create(input=talk(2, most // 3), **given)
    second = create(input="next?", previous_response_id=first.id, **given)
    assert "next?" in prompt_of(server) and "ask 0" not in prompt_of(server)
    assert second.usage.input_tokens + 4 <= most
    short = create(input="short", **given)
    assert short.usage.input_tokens < 20


def test_auto_refuses_what_cannot_be_left_out(spoken: Launch) -> None:
    server = spoken("ok")
    long = "many " * server.engine.info.max_model_len
    for items in (
        [{"role": "user", "content": long}],
        [{"role": "system", "content": long}, {"role": "user", "content": "a"},
         {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
            server.client().responses.create(model="fake-model", input=items, truncation="auto")
        assert caught.value.code == "context_length_exceeded"
