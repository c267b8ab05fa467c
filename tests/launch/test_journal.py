"""A server and batches that are killed at random moments: with a journal, what was stored answers,
what ran in the background and what a batch was at goes on with the tokens that it gets
undisturbed."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ds_cp.journal.file import read_journal
from ds_cp.journal.place import Place
from tests.helpers.jobs import Job, command
from tests.launch.conftest import Start, Write

KILLS = 3  # of a batch
ANSWER_S = 60.0  # for all answers, on a machine that does nothing else
KV = {"tokens_per_rank": 16384, "block_size": 16}
GREEDY = {"input": "Hello", "max_output_tokens": 380, "temperature": 0}
SEEDED = {"input": "One", "max_output_tokens": 350, "temperature": 1.0, "seed": 7}
SCORED = {"input": "Two", "max_output_tokens": 200, "temperature": 0.7, "seed": 8,
          "include": ["message.output_text.logprobs"], "top_logprobs": 2}  # fmt: skip
WRITTEN = {"input": "Say", "max_output_tokens": 150, "temperature": 1.0, "seed": 9,
           "presence_penalty": 0.4,
           "text": {"format": {"type": "json_schema", "name": "x", "schema": {
               "type": "array", "items": {"enum": ["a", "b"]}, "minItems": 40}}}}  # fmt: skip
BODIES = [GREEDY, SEEDED, SCORED, WRITTEN]


def asked(url: str, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as err:
        return err.code, json.loads(err.read())


def created(url: str, **body: Any) -> dict[str, Any]:
    status, reply = asked(url, "/v1/responses", body)
    assert status == 200, reply
    found: dict[str, Any] = reply
    return found


def polled(job: Job, url: str, names: list[str]) -> list[dict[str, Any]]:
    """The responses with these ids, once none of them runs."""

    def done() -> list[Any] | None:
        found = [asked(url, f"/v1/responses/{name}") for name in names]
        assert all(status == 200 for status, _ in found), found
        over = all(reply["status"] != "in_progress" for _, reply in found)
        return [reply for _, reply in found] if over else None

    replies: list[dict[str, Any]] = job.until("answers", done, ANSWER_S)
    return replies


def told(reply: dict[str, Any]) -> Any:
    """What of a response does not differ from run to run."""
    items = [{k: v for k, v in item.items() if k != "id"} for item in reply["output"]]
    usage = {k: v for k, v in reply["usage"].items() if k != "input_tokens_details"}
    return reply["status"], items, usage


def number(url: str, name: str) -> float:
    with urllib.request.urlopen(url + "/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


def began_again(url: str, names: list[str]) -> bool:
    """Whether nothing is left that has not gone on: it runs, or is over."""
    running = [asked(url, f"/v1/responses/{name}")[1]["status"] for name in names].count(
        "in_progress"
    )
    return number(url, "ds_cp:num_requests_running") >= running


def test_a_killed_server_owes_nothing(start: Start, config: Write, tmp_path: Path) -> None:
    """SIGKILL of the process with the HTTP front, twice; then the same command again."""
    file = config(
        kv_cache=KV, threads_per_rank=1, fault_tolerance={"journal_dir": str(tmp_path / "kept")}
    )
    argv = command("python", "serve", 1, ["--config", file])
    job = start(argv)
    url = job.ready()
    names = [created(url, background=True, **body)["id"] for body in BODIES]
    expected = [told(reply) for reply in polled(job, url, names)]
    assert all(status != "failed" for status, _, _ in expected), expected
    first = created(url, input="remember", max_output_tokens=10, temperature=0)
    later = created(url, input="more", previous_response_id=first["id"], max_output_tokens=9,
                    temperature=0)  # fmt: skip
    gone = created(url, input="forget", max_output_tokens=5)["id"]
    assert asked(url, f"/v1/responses/{gone}", method="DELETE")[0] == 200
    names, resumed = [], 0.0
    for times in range(2):
        names += [created(url, background=True, **body)["id"] for body in BODIES * 3]
        time.sleep(random.random() / 5)  # any moment is as good as another
        job.process.kill()
        job.gone(30)
        job = start(argv)
        url = job.ready()
        for known in (first, later):
            assert asked(url, f"/v1/responses/{known['id']}") == (200, known)
        assert asked(url, f"/v1/responses/{gone}")[0] == 404
        again = created(url, input="more", previous_response_id=first["id"], temperature=0,
                        max_output_tokens=9)  # fmt: skip
        assert told(again) == told(later)
        job.until("the rest to go on", lambda: began_again(url, names), 30)  # noqa: B023
        resumed += number(url, "ds_cp:journal_resumed_requests_total")
        if times == 0:  # what is over by now is so after the next kill
            over = {reply["id"]: told(reply) for reply in polled(job, url, names[:4])}
    replies = polled(job, url, names)
    assert [told(reply) for reply in replies] == expected * 6, job.story()
    assert {name: told(r) for name, r in zip(names, replies, strict=True) if name in over} == over
    assert number(url, "ds_cp:journal_working") == 1
    assert number(url, "ds_cp:journal_lost_records_total") == 0
    assert resumed > 0, "every answer was over before its server was killed"
    # A second server on the same directory, and one of another config.
    other = start(argv)
    assert other.wait(60) == 2 and "is in use by another ds-cp" in other.err
    job.process.terminate()
    job.gone(30)
    assert job.process.returncode == 0, job.story()
    changed = json.loads(Path(file).read_text()) | {"max_model_len": 400}
    Path(file).write_text(json.dumps(changed))
    other = start(argv)
    assert other.wait(60) == 2 and "is the journal of another config" in other.err


def test_a_drain_leaves_the_rest_to_the_restart(
    start: Start, config: Write, tmp_path: Path
) -> None:
    """SIGTERM and no time for what runs: it is not over, and the next server goes on with it."""
    file = config(
        kv_cache=KV, threads_per_rank=1, fault_tolerance={"journal_dir": str(tmp_path / "kept")},
        server={"port": 0, "served_model_name": "tiny", "drain_timeout_s": 0},
    )  # fmt: skip
    argv = command("python", "serve", 1, ["--config", file])
    job = start(argv)
    url = job.ready()
    expected = told(polled(job, url, [created(url, background=True, **GREEDY)["id"]])[0])
    name = created(url, background=True, **GREEDY)["id"]
    job.process.terminate()
    job.gone(30)
    job = start(argv)
    url = job.ready()
    assert told(polled(job, url, [name])[0]) == expected, job.story()


def lines_of(path: Path) -> dict[str, Any]:
    """Answers by id, without what differs from run to run; each line whole, and none twice."""
    raw = path.read_bytes()
    assert raw.endswith(b"\n")
    found: dict[str, Any] = {}
    for line in raw.splitlines():
        answer = json.loads(line)
        body = answer["response"]["body"]
        for name in ("id", "created", "system_fingerprint"):
            body.pop(name, None)
        body["usage"].pop("prompt_tokens_details", None)
        assert answer["custom_id"] not in found
        found[answer["custom_id"]] = (answer["response"]["status_code"], body)
    return found


def test_a_killed_batch_goes_on(start: Start, config: Write, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = []
    for n in range(24):
        body: dict[str, Any] = {
            "prompt": f"Line {n}", "max_tokens": 60 + 17 * n % 400, "seed": n, "ignore_eos": True,
            "temperature": 0.0 if n % 3 else 1.0,
        }  # fmt: skip
        body |= {"n": 2} if n % 5 == 0 else {"logprobs": 1} if n % 5 == 1 else {}
        if n % 5 == 2:
            body |= {"prompt": [f"Line {n}", "and another"], "frequency_penalty": 0.5}
        lines.append({"custom_id": f"l{n}", "method": "POST", "url": "/v1/completions",
                      "body": body})  # fmt: skip
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kv = {"kv_cache": KV, "threads_per_rank": 1}

    def run(target: Path, **tolerance: Any) -> Job:
        file = config(**kv, fault_tolerance=tolerance)
        args = [str(source), str(target), "--config", file]
        return start(command("python", "batch", 1, args))

    undisturbed = run(tmp_path / "once.jsonl")
    assert undisturbed.wait(120) == 0, undisturbed.story()
    expected = lines_of(tmp_path / "once.jsonl")
    assert len(expected) == len(lines)
    target, kept = tmp_path / "out.jsonl", {"journal_dir": str(tmp_path / "kept")}
    resumed = []
    for _ in range(KILLS):
        job = run(target, **kept)
        had = target.stat().st_size if target.exists() else 0

        def begun(job: Job = job, had: int = had) -> bool:
            journal = tmp_path / "kept" / "journal"
            grows = target.exists() and target.stat().st_size > had
            return (
                job.process.poll() is not None
                or grows
                or (journal.exists() and journal.stat().st_size > 20_000)
            )

        job.until("its first tokens", begun, 120)
        time.sleep(random.random() / 4)
        job.process.kill()
        job.gone(30)
        resumed += re.findall(r"(\d+) lines of batches in the middle", job.err)
    job = run(target, **kept)
    assert job.wait(120) == 0, job.story()
    assert lines_of(target) == expected
    resumed += re.findall(r"(\d+) lines of batches in the middle", job.err)
    assert any(map(int, resumed)), "every line was over before its batch was killed"
    # Nothing of it is needed any more.
    found = read_journal(Place(kept["journal_dir"]))
    assert found is not None and found.entries == {}
