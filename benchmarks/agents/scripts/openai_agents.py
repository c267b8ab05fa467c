"""An agent of OpenAI's Agents SDK with one tool; it asks POST /v1/responses, streamed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)


@function_tool
def save_text(name: str, text: str) -> str:
    """Write a text into a file."""
    Path(name).write_text(text)
    return "written"


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{os.environ['DS_CP_URL']}/v1", api_key="none", max_retries=0)
    agent = Agent(
        name="writer",
        instructions="Write what you are told.",
        tools=[save_text],
        model=OpenAIResponsesModel("scripted", client),
    )
    result = Runner.run_streamed(agent, "Write the code into found.txt.")
    async for _ in result.stream_events():
        pass
    print(result.final_output)


asyncio.run(main())
