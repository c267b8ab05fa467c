"""An agent of Pydantic AI with one tool; it asks POST /v1/chat/completions."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{os.environ['DS_CP_URL']}/v1", api_key="none")
agent = Agent(
    OpenAIChatModel("scripted", provider=provider), instructions="Write what you are told."
)


@agent.tool_plain
def save_text(name: str, text: str) -> str:
    """Write a text into a file."""
    Path(name).write_text(text)
    return "written"


print(agent.run_sync("Write the code into found.txt.").output)
