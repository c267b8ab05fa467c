"""Clients that nobody here wrote against four ranks: each by its script in benchmarks/clients, and
one conversation through three protocols, which must say the same words.

Those that fit beside ds_cp are tried as they are installed; the others have an environment of their
own, which is made when it is missing and the package index answers.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from benchmarks.clients.proxy import Proxy
from benchmarks.clients.run import CLIENTS, Client, own_python, python_of, run
from tests.helpers.jobs import Job, command
from tests.helpers.tiny import make_tiny_model

KEY = "key-of-the-clients"
ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
NEW = 24  # tokens
INSTALL_S = 240.0  # seconds that pip gets for one environment
CHECKS = (
    "plain chat",
    "stream",
    "usage in the stream",
    "text completion",
    "async chat",
    "async stream",
    "tools",
    "tools in a stream",
    "agent loop",
    "JSON output",
    "JSON by a schema",
    "JSON by a schema in a stream",
    "response",
    "response in a stream",
    "response with tools",
    "response by a schema",
    "message",
    "tokens counted",
)
ANTHROPIC = {"message", "tokens counted"}
RESPONSES = {each for each in CHECKS if each.startswith("response")}
# What a client has nothing of.
ABSENT = {
    "openai": ANTHROPIC,
    "anthropic": {"text completion", "JSON output"} | RESPONSES,
    "langchain-openai": ANTHROPIC,
    "llm": {"response with tools", "response by a schema"} | ANTHROPIC,
    "litellm": {"tokens counted"},
    "instructor": {"text completion", "async stream", "agent loop"}
    | (RESPONSES - {"response with tools"})
    | ANTHROPIC,
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of four ranks, each with room for a quarter of its longest request;
    its key is ``KEY``. The model is the tiny one with more positions: a character is a token."""
    folder = tmp_path_factory.mktemp("four")
    whole = {
        "model": str(make_tiny_model(folder / "model", positions=4096)),
        "dtype": "fp32",
        "kv_cache": {"tokens_per_rank": 512, "block_size": 16},
        "server": {"port": 0, "served_model_name": ["tiny", "claude-tiny"], "api_key": KEY},
    }
    file = folder / "config.json"
    file.write_text(json.dumps(whole))
    job = Job(command("ds-cp", "serve", 4, ["--config", str(file)]), folder)
    try:
        yield job.ready()
    finally:
        job.close()


@pytest.fixture(scope="module")
def proxy(four: str) -> Iterator[Proxy]:
    with Proxy(four) as running:
        yield running


def python(client: Client) -> Path:
    """One that has the client; the test is skipped where there is none and none can be made."""
    if found := own_python(client):
        return found
    try:
        return python_of(client, INSTALL_S)
    except (RuntimeError, OSError, subprocess.SubprocessError) as err:
        why = " ".join(str(err).split())[-200:]
        again = f"python -m benchmarks.clients --check --only {client.name}"
        pytest.skip(f"its environment cannot be made ({why}); with a package index: {again}")


@pytest.mark.timeout(900)  # the first run installs
@pytest.mark.parametrize(
    "client", [each for each in CLIENTS if each.name in ABSENT], ids=lambda each: each.name
)
def test_a_client_is_served(client: Client, four: str, proxy: Proxy) -> None:
    found = run(client, python(client), four, "tiny", KEY, proxy, CHECKS)
    results = {row["check"]: row for row in found["rows"]}
    assert list(results) == list(CHECKS)
    bad = [row for row in results.values() if row["result"] == "failed"]
    assert not bad, bad
    assert {check for check in CHECKS if results[check]["result"] == "none"} == ABSENT[client.name]


def test_the_prompts_of_clients_span_ranks(four: str) -> None:
    """The description of a tool is longer than what one rank holds here."""
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as over:

        def spanning() -> float:
            found = re.findall(
                r'ds_cp:mode_counts_total\{.*mode="(?:ring|tree)".*\} (.*)',
                over.get(f"{four}/metrics").text,
            )
            return sum(map(float, found))

        before = spanning()
        tool = {"name": "f", "description": "What it does. " * 50, "input_schema": {}}
        body = {
            "model": "tiny",
            "tools": [tool],
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "Hello"}],
        }
        answer = over.post(f"{four}/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        assert spanning() > before


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
