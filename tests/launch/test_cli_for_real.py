"""The commands against an engine and a server that are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.tiny import greedy_tokens

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    name: value for name, value in os.environ.items() if not name.startswith("DS_CP_")
} | {"PYTHONPATH": str(ROOT)}  # fmt: skip


def ds_cp(*argv: str, stdin: str = "", **env: str) -> str:
    """What ``ds-cp argv`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "ds_cp.cli", *argv], cwd=ROOT, input=stdin, env=ENV | env,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_latency_over_two_ranks_and_throughput_on_one(config: Any, tmp_path: Path) -> None:
    file = config(kv_cache={"tokens_per_rank": 256, "block_size": 16})
    sizes = ["--config", file, "--output-len", "4", "--repeats", "2", "--json"]
    found = json.loads(ds_cp("bench", "latency", "--ranks", "2", "--input-len", "40", *sizes))
    rows = {row["name"]: row for row in found["figures"]}
    assert found["about"]["ranks"] == 2 and rows["TTFT"]["count"] == 2
    for row in rows.values():
        assert 0 < row["min"] <= row["median"] < 60_000 and row["unit"] == "ms"
    assert rows["TTFT"]["min"] < rows["whole"]["min"]
    argv = ["--requests", "3", "--input-len", "12"]
    found = json.loads(ds_cp("bench", "throughput", *argv, *sizes))
    rows = {row["name"]: row for row in found["figures"]}
    assert found["about"]["ranks"] == 1 and rows["tokens a second"]["count"] == 2
    rounds = 12 / rows["tokens a second"]["max"] * 1000
    assert abs(rounds / rows["round"]["min"] - 1) < 0.01


def test_a_server_and_those_who_talk_to_it(config: Any, tiny: Path) -> None:
    file = config(kv_cache={"tokens_per_rank": 512, "block_size": 16})
    server = subprocess.Popen(
        [sys.executable, "-m", "ds_cp.cli", "serve", "--json"], cwd=ROOT, stdout=subprocess.PIPE,
        text=True, env=ENV | {"DS_CP_SERVE_CONFIG": file},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert ready["ready"] is True and any("ranks: 1" in line for line in ready["summary"])
        url = ready["urls"][0]
        chat = ["chat", "Hello", "--temperature", "0", "--max-tokens", "6", "--json"]
        answer = json.loads(ds_cp(*chat, DS_CP_CHAT_URL=url))
        assert answer["completion_tokens"] <= 6 and answer["ttft_s"] > 0
        talk = "Hello\n/retry\n"
        lines = ds_cp("chat", "--url", url, *chat[2:], "--lines", stdin=talk).splitlines()
        assert [json.loads(line)["content"] for line in lines] == [answer["content"]] * 2
        top = json.loads(ds_cp("top", "--url", url, "--once", "--json"))
        assert top["model"] == "tiny" and top["picture"]["num_ranks"] == 1
        assert len(top["picture"]["recent"]) == 3
        assert "host " in ds_cp("top", "--url", url)
        load = ["--requests", "4", "--input-len", "3", "--output-len", "3", "--json"]
        found = json.loads(ds_cp("bench", "serve", "--url", url, *load))
        assert found["about"]["answered"] == 4 and found["about"]["completion_tokens"] == 12
        server.send_signal(signal.SIGTERM)
        assert server.stdout.read() == "" and server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


def test_the_command_line_of_one_prompt_is_the_model_s(config: Any, tiny: Path) -> None:
    """All by the environment, as in a container."""
    env = {"DS_CP_GENERATE_CONFIG": config(), "DS_CP_GENERATE_PROMPT": "Hello",
           "DS_CP_GENERATE_JSON": "1", "DS_CP_GENERATE_MAX_TOKENS": "12"}  # fmt: skip
    found = json.loads(ds_cp("generate", **env))
    assert list(found["outputs"][0]["token_ids"]) == greedy_tokens(tiny)[0]
