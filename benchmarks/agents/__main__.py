"""Agents that people use, unmodified, against a server of four ranks.

Each is told to write a code into a file. The served model is a Llama that follows a script
(``model.py``): it calls the tool for a shell that the agent offers, and has the last word behind
the result. So the agent's own prompt, its tools and its loop are tried with every field that it
sends; what a model makes of them is not. An agent has done it when the file holds the code, its
last word is the model's, and the server refused nothing.

    python -m benchmarks.agents                  # all; installs each under .cache/environments
    python -m benchmarks.agents --only Codex
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.agents.environments import prepare
from benchmarks.agents.known import AGENTS, CALLS, CODE, FILE, LAST, SERVED, Agent
from benchmarks.agents.model import write_model
from benchmarks.common import MODEL, RESULTS, command, commit, finish, machine, parser
from benchmarks.server import serving

ASKED = frozenset(agent.route for agent in AGENTS)
LIMIT_S = 180.0  # seconds for one agent


def main(argv: Sequence[str]) -> int:
    names = [agent.name for agent in AGENTS]
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--only", nargs="+", choices=names, default=names)
    arguments.add_argument("--check", action="store_true", help="write no result")
    arguments.add_argument("--out", type=Path, default=RESULTS / "agents.json")
    args = arguments.parse_args(argv)
    facts = machine() | {"commit": commit(), "command": command("agents", argv)}
    agents = [(agent, prepare(agent)) for agent in AGENTS if agent.name in args.only]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, Path(MODEL), CALLS, LAST)
        sections: dict[str, Any] = {
            "model": str(folder),
            "dtype": "bf16",
            "kv_cache": {"tokens_per_rank": 16_384},
            "server": {"served_model_name": SERVED},
        }
        with serving(args.ranks, **sections) as (url, _):
            rows = [tried(agent, where, url) for agent, where in agents]
    for row in rows:
        print(f"{row['agent']:20} {row['result']:7} {row['detail']}")
    about = {"ranks": args.ranks, "agents": rows}
    finish(facts | about, None if args.check else args.out)
    return int(any(row["result"] != "ok" for row in rows))


def tried(agent: Agent, folder: Path, url: str) -> dict[str, Any]:
    """Run one agent in a home of its own; what it did."""
    before = counted(url)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        work = home / "work"
        work.mkdir()
        for path, text in agent.files(url).items():
            file = home / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        code, said = _run(agent.command(folder), work, _environment(agent, home, url))
        written = (work / FILE).read_text().strip() if (work / FILE).exists() else None
    after = counted(url)
    asked = {name: after[name] - before[name] for name in after}
    problem = ""
    if code != 0:
        problem = f"exit code {code}: {said[-300:]}" if code is not None else "did not end"
    elif written != CODE:
        problem = f"{FILE} holds {written!r}: {said[-300:]}"
    elif LAST not in said:
        problem = f"its last word is {said[-300:]!r}"
    elif asked["refused"]:
        problem = f"the server refused {asked['refused']} of its requests"
    return {
        "agent": agent.name,
        "packages": list(agent.packages),
        "route": agent.route,
        "result": "failed" if problem else "ok",
        "detail": " ".join(problem.split()),
        "seconds": round(time.monotonic() - began, 1),
        "requests": asked["requests"],
        "prompt_tokens": asked["prompt_tokens"],
        "cached_tokens": asked["cached_tokens"],
    }


def _environment(agent: Agent, home: Path, url: str) -> dict[str, str]:
    """Of the machine only what finds programs: no key and no proxy of its user."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
    node = shutil.which("node")
    if node is not None:
        kept["PATH"] = f"{Path(node).parent}:{kept['PATH']}"
    return kept | {"HOME": str(home), "IS_SANDBOX": "1", **agent.env(url)}


def _run(argv: Sequence[str], folder: Path, env: dict[str, str]) -> tuple[int | None, str]:
    try:
        done = subprocess.run(
            argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as err:
        return None, (err.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def counted(url: str) -> dict[str, int]:
    """What the server has counted so far: requests, refused ones, tokens of prompts."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = dict.fromkeys(("requests", "refused", "prompt_tokens", "cached_tokens"), 0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            value = int(sample.value)
            if sample.name == "ds_cp:http_requests_total":
                found["requests"] += value if sample.labels["handler"] in ASKED else 0
                found["refused"] += value if int(sample.labels["status"]) >= 400 else 0
            elif sample.name == "ds_cp:prompt_tokens_total":
                found["prompt_tokens"] += value
            elif sample.name == "ds_cp:prefix_cache_hits_total":
                found["cached_tokens"] += value
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
