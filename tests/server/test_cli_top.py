"""``ds-cp top`` and ``ds-cp bench serve`` against the application over the fake engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_cp.cli import main as cli
from tests.helpers.pictures import PicturedJob
from tests.helpers.scripted import scripted
from tests.helpers.terminal import Terminal, variables
from tests.server.conftest import Running

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", *variables()):
        monkeypatch.delenv(name, raising=False)


def busy(served: Running) -> PicturedJob:
    job = PicturedJob()
    job.add(100)
    job.add(6)
    job.step(3)
    served.engine.shown = job.picture()
    return job


def test_one_picture(served: Running, capfd: Any) -> None:
    busy(served)
    for flags in (["--once"], []):  # stdout is no terminal
        assert cli.main(["top", "--url", served.url, *flags]) == 0
        out, err = capfd.readouterr()
        assert err == "" and "4 ranks on 2 hosts" in out and "host beta" in out
        assert "fake-model, 128 tokens, ready" in out and "\x1b" not in out
        assert max(map(len, out.splitlines())) <= 120


def test_one_object(served: Running, capfd: Any) -> None:
    job = busy(served)
    assert cli.main(["top", "--url", served.url, "--once", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and err == "" and out.isascii()
    assert found["picture"]["num_ranks"] == 4 and found["state"] == "ready"
    ids = [request["id"] for request in found["picture"]["requests"]]
    assert ids == [request.id for request in job.picture().requests]


def test_an_object_for_each_change(served: Running) -> None:
    job = busy(served)
    process = subprocess.Popen(
        [sys.executable, "-m", "ds_cp.cli", "top", "--json", "--url", served.url],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        job.add(8)
        served.engine.shown = job.picture()
        second = json.loads(process.stdout.readline())
        while len(second["picture"]["requests"]) == len(first["picture"]["requests"]):
            second = json.loads(process.stdout.readline())  # rates may have come meanwhile
        assert len(second["picture"]["requests"]) == 3
        served.engine.state = "dead"
        rest = process.stdout.read().splitlines()
        assert json.loads(rest[-1])["state"] == "dead"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_at_a_terminal_until_ctrl_c(served: Running) -> None:
    job = busy(served)
    with Terminal("top", "--url", served.url, columns=120, rows=50) as terminal:
        terminal.until("\x1b[?1049h")  # a screen of its own
        terminal.until("4 ranks on 2 hosts")
        job.add(8)
        served.engine.shown = job.picture()
        terminal.until("2 running, 1 waiting")
        terminal.send("\x03")
        assert terminal.ends() == 0
        left = terminal.shown[-40:]  # the screen and the cursor are given back
        assert "\x1b[?1049l" in left and "\x1b[?25h" in left


def test_sigterm_gives_the_screen_back(served: Running) -> None:
    busy(served)
    with Terminal("top", "--url", served.url) as terminal:
        terminal.until("4 ranks on 2 hosts")
        terminal.process.terminate()
        assert terminal.ends() == 143
        left = terminal.shown[-40:]
        assert "\x1b[?1049l" in left and "\x1b[?25h" in left and "Traceback" not in terminal.shown


def test_a_server_that_comes_back() -> None:
    job = PicturedJob()
    job.add(6)
    frame = {"at": 1.0, "state": "ready", "model": "m\x1b[2J", "max_model_len": 9, "rates": None,
             "picture": None}  # fmt: skip

    def state(h: Any, _: Any) -> None:
        if "once" in h.path:
            h.reply(frame)
        else:
            h.begin()
            h.event(frame)

    with scripted() as there:
        there.answers["/state"] = state
        with Terminal("top", "--url", there.url) as terminal:
            terminal.until("m [2J")
            terminal.until("looking again")
            terminal.until("m [2J")
            there.answers["/state"] = lambda h, _: h.reply({"error": {"message": "no\x1b[2J"}}, 503)
            terminal.until("HTTP 503: no [2J")
            terminal.send("\x03")
            assert terminal.ends() == 0


@pytest.mark.parametrize("flags", [[], ["--json"], ["--once"]])
def test_no_server_is_one_line(capfd: Any, flags: list[str]) -> None:
    with scripted() as there:
        url = there.url
        assert cli.main(["top", "--url", url, *flags]) == 2  # it has no /state
        assert "has no /state" in capfd.readouterr().err
    assert cli.main(["top", "--url", url, *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "no server answers" in err and err.count("\n") == 1


# --- bench serve


def test_a_closed_loop(served: Running, capfd: Any) -> None:
    argv = "--requests 12 --warmup 2 --concurrency 3 --input-len 3 --output-len 5 --json".split()
    assert cli.main(["bench", "serve", "--url", served.url, *argv]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and err == ""
    assert found["bench"] == "serve" and found["notes"] == [] and found["date"].endswith("Z")
    assert found["settings"]["loop"] == "closed" and found["settings"]["concurrency"] == 3
    about = found["about"]
    assert (about["answered"], about["failed"], about["model"]) == (12, 0, "fake-model")
    assert about["completion_tokens"] == 12 * 5
    seen = served.engine.seen
    assert len(seen) == 14 and all(p.max_tokens == 5 and p.ignore_eos for _, p in seen)
    assert len({tuple(prompt) for prompt, _ in seen}) == 14  # none is another's prefix
    assert about["prompt_tokens"] == sum(len(prompt) for prompt, _ in seen[2:])
    rows = {row["name"]: row for row in found["figures"]}
    assert rows["TTFT"]["count"] == rows["whole"]["count"] == 12
    for row in rows.values():
        assert 0 <= row["min"] <= row["median"] <= row["p90"] <= row["p99"] <= row["max"]
    rate = about["completion_tokens"] / about["seconds"]
    assert abs(rows["tokens a second"]["median"] / rate - 1) < 0.01
    assert found["machine"]["cores"] >= 1 and found["ds_cp"]


def test_an_open_loop_as_a_table(served: Running, capfd: Any) -> None:
    argv = "--requests 10 --rate 500 --input-len 2 --output-len 2 --warmup 0 --seed 5".split()
    assert cli.main(["bench", "serve", "--url", served.url, *argv]) == 0
    out, _ = capfd.readouterr()
    assert "loop open, requests 10" in out and "rate 500.0" in out and "answered 10" in out
    for name in ("TTFT", "TPOT", "gap", "whole", "sent late", "tokens a second", "median", "min"):
        assert name in out
    assert "\x1b" not in out and "cores" in out
    prompts = [prompt for prompt, _ in served.engine.seen]
    cli.main(["bench", "serve", "--url", served.url, *argv])
    assert sorted(p for p, _ in served.engine.seen[10:]) == sorted(prompts)  # by the seed


def test_failures_are_counted_and_shown(served: Running, capfd: Any) -> None:
    argv = "--requests 4 --input-len 2 --output-len 4 --warmup 0 --json".split()
    served.engine.end = "error"
    assert cli.main(["bench", "serve", "--url", served.url, *argv]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["about"]["failed"] == 4 and found["figures"] == []
    assert found["notes"][0].startswith("failed, 4 times: ")
    argv[argv.index("0")] = "1"
    assert cli.main(["bench", "serve", "--url", served.url, *argv]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "every request before those that count failed" in err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--requests", "0"], "--requests is 0"), (["--rate", "0"], "--rate is 0"),
        (["--rate", "nan"], "--rate is nan"), (["--concurrency", "5000"], "--concurrency is 5000"),
        (["--rate", "1", "--concurrency", "2"], "give one of them"),
        (["--output-len", "-1"], "--output-len is -1"), (["--warmup", "-1"], "--warmup is -1"),
        (["--url", "nowhere"], "--url is nowhere"), (["--model", "x"], "HTTP 404"),
        (["--input-len", "100000000"], "--input-len is"),
        (["--input-len", "100000", "--concurrency", "4096"], "are 409600000 words at once"),
        (["--requests", "1000000", "--output-len", "100"], "the times of 100000000 tokens"),
    ],
)  # fmt: skip
def test_wrong_flags_of_bench_serve(
    served: Running, capfd: Any, flags: list[str], part: str
) -> None:
    code = cli.main(["bench", "serve", "--url", served.url, *flags])
    out, err = capfd.readouterr()
    assert code == (1 if part == "HTTP 404" else 2)
    assert out == "" and part in err and err.count("\n") == 1
