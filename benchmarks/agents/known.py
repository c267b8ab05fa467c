"""The agents that are tried: where they come from, what they are told, which tool they offer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SERVED = "scripted"
TASK = "Write the code into found.txt."
FILE, CODE = "found.txt", "7431"
LAST = "The code is in found.txt."
_SHELL = f"echo {CODE} > {FILE}"
# The arguments of the one call that the model makes, by the tools that agents offer for a shell.
CALLS: dict[str, dict[str, Any]] = {
    "Bash": {"command": _SHELL, "description": "Write the code"},
    "bash": {"command": _SHELL, "description": "Write the code"},
    "exec_command": {"cmd": _SHELL},
    "run_shell_command": {"command": _SHELL, "description": "Write", "is_background": False},
    "save_text": {"name": FILE, "text": CODE},
}
SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Agent:
    """``packages``: of npm or of pip (``python``). ``command``: from the folder of the environment,
    the server's address and the agent's home, to the words of its command; ``env``: likewise.
    ``files``: by their path below the home. ``route``: the one it asks."""

    name: str
    route: str
    packages: Sequence[str]
    command: Callable[[Path], Sequence[str]]
    python: bool = False
    env: Callable[[str], Mapping[str, str]] = lambda url: {}
    files: Callable[[str], Mapping[str, str]] = field(default=lambda url: {})


def npm(name: str) -> Callable[[Path], str]:
    """The command ``name`` of an npm environment."""
    return lambda folder: str(folder / "node_modules" / ".bin" / name)


def _codex(url: str) -> dict[str, str]:
    return {
        ".codex/config.toml": (
            f'model = "{SERVED}"\nmodel_provider = "ds_cp"\napproval_policy = "never"\n'
            'sandbox_mode = "danger-full-access"\n\n[model_providers.ds_cp]\nname = "ds_cp"\n'
            f'base_url = "{url}/v1"\nwire_api = "responses"\n'
        )
    }


def _opencode(url: str) -> dict[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "ds_cp",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {SERVED: {"tool_call": True, "limit": {"context": 65536, "output": 8192}}},
    }
    whole = {"provider": {"ds_cp": provider}, "permission": {"bash": "allow"}, "autoupdate": False}
    return {"work/opencode.json": json.dumps(whole)}


AGENTS = (
    Agent(
        "Claude Code",
        "/v1/messages",
        ("@anthropic-ai/claude-code@2.1.197",),
        lambda folder: [npm("claude")(folder), "-p", TASK, "--allowedTools", "Bash"],
        env=lambda url: {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": "none",
            "ANTHROPIC_MODEL": SERVED,
            "ANTHROPIC_SMALL_FAST_MODEL": SERVED,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        },
    ),
    Agent(
        "Codex",
        "/v1/responses",
        ("@openai/codex@0.171.0",),
        lambda folder: [npm("codex")(folder), "exec", "--skip-git-repo-check", TASK],
        files=_codex,
    ),
    Agent(
        "opencode",
        "/v1/chat/completions",
        ("opencode-ai@1.18.33",),
        lambda folder: [npm("opencode")(folder), "run", "-m", f"ds_cp/{SERVED}", TASK],
        files=_opencode,
    ),
    Agent(
        "Qwen Code",
        "/v1/chat/completions",
        ("@qwen-code/qwen-code@0.15.10",),
        lambda folder: [npm("qwen")(folder), "-y", "--auth-type", "openai", "-p", TASK],
        env=lambda url: {
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": "none",
            "OPENAI_MODEL": SERVED,
        },
    ),
    Agent(
        "OpenAI Agents SDK",
        "/v1/responses",
        ("openai-agents==0.24.0",),
        lambda folder: [str(folder / "bin" / "python"), str(SCRIPTS / "openai_agents.py")],
        python=True,
        env=lambda url: {"DS_CP_URL": url},
    ),
    Agent(
        "Pydantic AI",
        "/v1/chat/completions",
        ("pydantic-ai-slim[openai]==2.68.0",),
        lambda folder: [str(folder / "bin" / "python"), str(SCRIPTS / "pydantic_ai_agent.py")],
        python=True,
        env=lambda url: {"DS_CP_URL": url},
    ),
)
