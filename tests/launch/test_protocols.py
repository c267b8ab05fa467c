"""One conversation over four ranks through three protocols, by their clients: the same words."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.launch.conftest import KEY

ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
NEW = 24  # tokens


@pytest.fixture(scope="module")
def gpt(four: str) -> Any:
    return openai.OpenAI(base_url=f"{four}/v1", api_key=KEY, max_retries=0, timeout=120.0)


@pytest.fixture(scope="module")
def claude(four: str) -> Any:
    return anthropic.Anthropic(base_url=four, api_key=KEY, max_retries=0, timeout=120.0)


@pytest.fixture(scope="module")
def words(gpt: Any) -> str:
    """What chat completions says, greedy."""
    reply = gpt.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=NEW, temperature=0, logprobs=False
    )
    text: str = reply.choices[0].message.content
    assert text
    return text


def test_a_response_says_the_same(gpt: Any, words: str) -> None:
    ask = {"model": "tiny", "max_output_tokens": NEW, "temperature": 0}
    first = gpt.responses.create(instructions="Be brief.", input="Hello", **ask)
    assert first.output_text == words
    with gpt.responses.stream(instructions="Be brief.", input="Hello", **ask) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == words and len(deltas) > 1
    # The next turn, by the store, is the next turn of the same chat.
    messages = [*ASK, {"role": "assistant", "content": words}, {"role": "user", "content": "More"}]
    expected = gpt.chat.completions.create(
        model="tiny", messages=messages, max_tokens=NEW, temperature=0
    )
    second = gpt.responses.create(
        previous_response_id=first.id, instructions="Be brief.", input="More", **ask
    )
    assert second.output_text == expected.choices[0].message.content
    assert second.usage.input_tokens == expected.usage.prompt_tokens


def test_a_message_says_the_same(gpt: Any, claude: Any, words: str) -> None:
    ask = {
        "model": "claude-tiny",
        "system": "Be brief.",
        "messages": ASK[1:],
        "max_tokens": NEW,
        "extra_body": {"temperature": 0},
    }
    message = claude.messages.create(**ask)
    assert message.content[0].text == words and message.model == "claude-tiny"
    with claude.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == words
        final = stream.get_final_message()
    assert final.stop_reason == message.stop_reason
    assert final.usage.output_tokens == message.usage.output_tokens
    count = claude.messages.count_tokens(
        model="tiny", system="Be brief.", messages=ASK[1:]
    ).input_tokens
    chat = gpt.chat.completions.create(model="tiny", messages=ASK, max_tokens=1)
    assert count == chat.usage.prompt_tokens


def test_a_format_is_kept_in_each(gpt: Any, claude: Any) -> None:
    """A grammar of the real engine, whatever a random model would rather say."""
    schema = {
        "type": "object",
        "properties": {"x": {"enum": ["yes", "no"]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    response = gpt.responses.create(
        model="tiny", input="x", text={"format": named}, max_output_tokens=200, temperature=0
    )
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = claude.messages.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        output_config=config,
        max_tokens=200,
        extra_body={"temperature": 0},
    )
    assert response.status == "completed" and message.stop_reason == "end_turn"
    for text in (response.output_text, message.content[0].text):
        assert json.loads(text)["x"] in ("yes", "no")
    assert response.output_text == message.content[0].text


def test_a_reset_forgets_the_prefixes(gpt: Any, four: str) -> None:
    keyed = httpx.Client(base_url=four, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    ask = {"model": "tiny", "input": "One prompt of more than a block. " * 3}

    def cached() -> int:
        reply = gpt.responses.create(max_output_tokens=1, **ask)
        count: int = reply.usage.input_tokens_details.cached_tokens
        return count

    cached()
    assert cached() >= 16
    freed = keyed.post("/reset_prefix_cache")
    assert freed.status_code == 200 and freed.json()["blocks_freed"] > 0
    assert cached() == 0
    facts = keyed.get("/server_info").json()
    assert facts["ranks"] == 4 and facts["served_model_names"] == ["tiny", "claude-tiny"]
    assert keyed.get("/ready").json() == {"status": "ready"}
    assert keyed.get("/load").json()["server_load"] == 0
