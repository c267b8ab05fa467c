"""Whole jobs with a trace and a structured log."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from pathlib import Path
from typing import Any

from ds_cp.trace.summary import read_trace, summarize
from tests.helpers.jobs import END_S, START_S, command, json_lines
from tests.helpers.tiny import NEW, write_prompts
from tests.launch.conftest import Start, Write

TRACE_S = 60.0  # beyond the end of a job, to write its trace


def test_generate_with_a_trace(
    start: Start, config: Write, tmp_path: Path, expected: list[list[int]]
) -> None:
    """The same tokens; a prompt that spans both ranks is in the trace."""
    file, trace = config(kv_cache={"tokens_per_rank": 128, "block_size": 16}), tmp_path / "t.json"
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    args = ["--config", file, "--prompts-file", prompts, "--max-tokens", str(NEW), "--json",
            "--trace", str(trace)]  # fmt: skip
    job = start(command("ds-cp", "generate", 2, args))
    assert job.wait(START_S) == 0, job.story()
    job.gone(END_S)
    outputs = json_lines(job.out)
    assert [o["outputs"][0]["token_ids"] for o in outputs] == expected, job.story()
    assert job.err.count("ds_cp: trace of ") == 1 and str(trace) in job.err, job.story()
    summary = summarize(read_trace(str(trace)))
    modes = {mode.partition(" ")[0] for o in outputs for mode in o["metrics"]["modes"]}
    assert {mode.partition(" ")[0] for mode in summary.modes} == modes
    assert summary.ranks == 2 and summary.about["left_out_steps"] == 0


def test_batch_with_a_trace(start: Start, config: Write, tmp_path: Path) -> None:
    """Written when the ranks leave, of a request that needs both."""
    file = config(kv_cache={"tokens_per_rank": 128, "block_size": 16})
    body = {"prompt": [5] * 150, "max_tokens": 4, "ignore_eos": True}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    trace = tmp_path / "t.json"
    args = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--config", file,
            "--trace", str(trace)]  # fmt: skip
    job = start(command("ds-cp", "batch", 2, args))
    assert job.wait(START_S) == 0, job.story()
    job.gone(END_S)
    assert job.err.count("ds_cp: trace of ") == 1 and str(trace) in job.err, job.story()
    summary = summarize(read_trace(str(trace)))
    assert summary.ranks == 2 and summary.about["steps"] == 4
    assert summary.modes.keys() == {"ring pass-KV", "tree"}, job.story()
    assert all(mode.under_way > 0 for mode in summary.modes.values())


def test_serve_with_a_trace_and_a_log_of_objects(
    start: Start, config: Write, tmp_path: Path
) -> None:
    trace = tmp_path / "t.json"
    file = config(
        kv_cache={"tokens_per_rank": 128, "block_size": 16},
        server={"port": 0, "log_format": "json"},
        context_parallel={"local_threshold": 0},
        trace={"file": str(trace)},
    )
    job = start(command("ds-cp", "serve", 2, ["--config", file]))
    said = re.compile(r'"ds_cp ready: (http://[^" ,]+)')
    found = job.until("ready", lambda: said.search(job.out) or job.process.poll(), START_S)
    assert isinstance(found, re.Match), job.story()
    url = found[1]
    secret = "the quick brown fox"
    body = {"prompt": secret, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-Request-Id": "mine.1"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: dict[str, Any] = json.load(reply)

    def logged() -> list[dict[str, Any]]:
        whole = job.err.rpartition("\n")[0]  # the lines that have their end
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if line.get("event") == "request"]

    [line] = job.until("the request's line", logged, END_S)
    assert (line["request_id"], line["id"]) == ("mine.1", f"{answer['id']}-0")
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (line["new_tokens"], line["finish_reason"]) == (4, "length")
    assert line["ranks"] == [0, 1] and line["modes"] and line["e2e_s"] >= line["ttft_s"] > 0
    job.process.send_signal(signal.SIGINT)
    job.wait(END_S + TRACE_S)
    job.gone(END_S)
    for text in (job.out, job.err):
        for each in text.splitlines():
            found = json.loads(each)
            assert isinstance(found, dict) and "time" in found and "level" in found, each
    assert secret not in job.out + job.err and answer["choices"][0]["text"] not in job.err
    summary = summarize(read_trace(str(trace)))
    assert summary.ranks == 2 and summary.about["steps"] >= 4
    assert summary.modes["ring pass-KV"].under_way > 0, job.story()
