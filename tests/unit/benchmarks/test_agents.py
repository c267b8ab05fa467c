"""The model that follows a script follows it, in transformers; each agent is told where to ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.agents.known import AGENTS, CALLS, CODE, LAST, SERVED
from benchmarks.agents.model import write_model
from tests.helpers.documents import ROOT

URL = "http://127.0.0.1:8000"
READER = {"name": "Read", "description": "reads", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripted")
    write_model(folder, smollm2, CALLS, LAST)
    return folder


def test_it_calls_the_tool_that_is_offered_and_has_the_last_word(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def says(messages: list[dict[str, object]], *tools: str) -> str:
        offered = [READER, *({**READER, "name": name} for name in tools)]
        ids = tokenizer.apply_chat_template(
            messages,
            tools=[{"type": "function", "function": tool} for tool in offered],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    user = {"role": "user", "content": "Write it."}
    for name, arguments in CALLS.items():
        said = says([user], name)
        assert said.startswith("<tool_call>\n") and said.endswith("\n</tool_call>")
        call = json.loads(said[12:-13])
        assert call == {"name": name, "arguments": arguments} and CODE in json.dumps(arguments)
    result = {"role": "tool", "content": "written", "tool_call_id": "c"}
    assert says([user, {"role": "assistant", "content": ""}, result], "Bash") == LAST
    assert says([user]) == LAST


def test_agents_ask_the_routes_there_are_and_the_guide_says_how() -> None:
    guide = (ROOT / "docs" / "guides" / "agents.md").read_text()
    for agent in AGENTS:
        version = agent.packages[0].replace("==", "@").rpartition("@")[2]
        assert f"| {agent.name} {version} | `{agent.route}` |" in guide
        for name, value in agent.env(URL).items():
            if name.startswith(("ANTHROPIC", "OPENAI")) and value in (URL, f"{URL}/v1"):
                assert f"`{name}={value}`" in guide
    codex = next(agent for agent in AGENTS if agent.name == "Codex").files(URL)
    for line in codex[".codex/config.toml"].replace(SERVED, "smollm2-135m-instruct").splitlines():
        assert line in guide or line.startswith(("approval_policy", "sandbox_mode"))
