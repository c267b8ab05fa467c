"""The comparison with peers: turns, time limits and failures of contestants, ratios and the page;
contestants here are scripts of a few lines."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.peers import __main__ as peers
from benchmarks.peers import measure, players
from benchmarks.peers.__main__ import NAMES, main
from benchmarks.peers.installs import PEERS, Environments
from benchmarks.peers.measure import MOST_LOAD, Case, Figures, play
from benchmarks.peers.model import _rotate_in_pairs
from benchmarks.peers.players import Job, Player, PlayerError
from benchmarks.peers.ratios import ratio_rows, same_tokens
from benchmarks.peers.report import page, plot
from benchmarks.peers.rows import Ratio, Row, rows

START = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import child
def start(options):
    print("a library says something")
    if options.get("fails"):
        raise RuntimeError("no such thing here")
    def run(case):
        if case.get("seed") == options.get("breaks"):
            raise ValueError("cannot do that")
        if case.get("seed") == options.get("ends"):
            sys.stderr.write("a last word\\n"); sys.stderr.flush(); os._exit(3)
        time.sleep(options.get("sleeps", 0))
        rank = int(os.environ["RANK"])
        return {{"seconds": [options["took"] + rank, options["took"] * 2], "max_error": rank / 8,
                "ids": options.get("ids", [])}}
    return run
child.serve(start)
"""


Maker = Callable[..., Callable[[], Player]]


@pytest.fixture
def contestant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    scripts = players.SCRIPTS
    (tmp_path / "contestant.py").write_text(START.format(scripts=str(scripts)))
    monkeypatch.setattr(players, "SCRIPTS", tmp_path)
    monkeypatch.setattr(players, "END_S", 0.5)

    def make(name: str, ranks: int = 1, **options: Any) -> Callable[[], Player]:
        return lambda: Player(
            name, Path(sys.executable), "contestant.py", options, ranks, start_s=20
        )

    return make


def questions(rounds: int = 2, limit_s: float = 20.0) -> list[Case]:
    return [Case("256 tokens", {"tokens": 256}, rounds, limit_s)]


def test_turns_are_kept_by_rank_and_round(contestant: Maker) -> None:
    two = contestant("two", ranks=2, took=1.0, ids=[1, 2, 3])
    one = contestant("one", took=4.0, ids=[1, 2, 9])
    found, _ = play([two, one], ["two", "one"], questions(), {"seed": 1})
    got = found["256 tokens"]
    # A call took as long as the rank that took longest.
    assert got["two"].seconds == {"seconds": [2.0, 2.0, 2.0, 2.0]}
    assert got["one"].seconds == {"seconds": [4.0, 8.0, 4.0, 8.0]}
    assert got["two"].told["max_error"] == 1 / 8
    assert same_tokens(found, "one") == {"256 tokens": {"two": 2, "one": 3}}
    case = "256 tokens"
    [row] = ratio_rows([Ratio("r", (case, "one", "seconds"), (case, "two", "seconds"), 2.5)], found)
    assert (row["min"], row["median"], row["met"]) == (2.0, 3.0, False)


def test_one_that_fails_is_left_out_with_its_reason(contestant: Maker) -> None:
    entries = {
        "good": contestant("good", took=1.0),
        "never starts": contestant("never starts", took=1.0, fails=True),
        "breaks": contestant("breaks", took=1.0, breaks=1007),
        "ends": contestant("ends", took=1.0, ends=1007),
        "not there": lambda: (_ for _ in ()).throw(PlayerError("not installed: no")),
    }
    found, _ = play(list(entries.values()), list(entries), questions(3), {"seed": 1})
    got = found["256 tokens"]
    assert got["good"].failed == "" and len(got["good"].seconds["seconds"]) == 6
    assert got["never starts"].failed == "RuntimeError: no such thing here"
    assert got["breaks"].failed == "ValueError: cannot do that"
    assert len(got["breaks"].seconds["seconds"]) == 2, "its first round counts"
    assert "a last word" in got["ends"].failed
    assert got["not there"].failed == "not installed: no"
    case = "256 tokens"
    good = (case, "good", "seconds")
    [row] = ratio_rows([Ratio("r", (case, "never starts", "seconds"), good, 1.0)], found)
    assert row["failed"] == "never starts: RuntimeError: no such thing here"


def test_one_that_is_late_is_ended(contestant: Maker) -> None:
    job = Job(contestant("slow", took=1.0, sleeps=600)())
    process = psutil.Process(job._processes[0].pid)
    began = time.monotonic()
    with pytest.raises(PlayerError, match="no answer within 0 s"):
        job.ask({"seed": 1}, 0.2)
    job.close()
    assert time.monotonic() - began < 60 and not process.is_running()


def stopped(process: psutil.Process) -> None:
    """Wait until it is: the system takes a moment."""
    until = time.monotonic() + 60
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_those_who_wait_are_stopped(contestant: Maker) -> None:
    job = Job(contestant("patient", took=1.0)())
    try:
        process = psutil.Process(job._processes[0].pid)
        stopped(process)
        assert job.ask({"seed": 1}, 60)[0]["seconds"] == [1.0, 2.0]
        stopped(process)
    finally:
        job.close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a process with its parent")
def test_nobody_stays_when_the_benchmark_is_killed(contestant: Maker) -> None:
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from benchmarks.peers import players
        players.SCRIPTS = Path({str(players.SCRIPTS)!r})
        player = players.Player("p", Path({sys.executable!r}), "contestant.py", {{"took": 1.0}})
        job = players.Job(player)
        print(job._processes[0].pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=players.ROOT)
    until = time.monotonic() + 60
    while psutil.pid_exists(int(run.stdout)):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_bytes_over_bandwidth() -> None:
    case = "SmolLM2, 10 tokens"
    ours = Figures({"tpot": [0.5]}, {"weight_bytes": 900, "kv_bytes": 10})
    memory = Figures({"seconds": [0.1]}, {"bytes": 500})
    ratio = Ratio("r", (case, "ds_cp", "tpot"), (case, "memory", "seconds"), 1.6, least=False,
                  per_byte=True, tokens=10)  # fmt: skip
    [row] = ratio_rows([ratio], {case: {"ds_cp": ours, "memory": memory}})
    assert row["min"] == pytest.approx(0.5 / (0.1 * 1000 / 500)) and not row["met"]


def test_a_target_is_held_against_what_it_names() -> None:
    found = {"c": {"a": Figures({"seconds": [10.0, 30.0, 30.0]}, {"max_error": 0.25}),
                   "b": Figures({"seconds": [2.0, 2.0, 2.0]}, {"max_error": 0.5})}}  # fmt: skip
    above, below = ("c", "a", "seconds"), ("c", "b", "seconds")
    error = ("c", "a", "max_error"), ("c", "b", "max_error")
    got = ratio_rows([
        Ratio("minima", above, below, 10.0), Ratio("medians", above, below, 10.0, by="median"),
        Ratio("error", *error, 1.0, least=False), Ratio("the other", *error[::-1], 1.0, False),
    ], found)  # fmt: skip
    assert [row["met"] for row in got] == [False, True, True, False]
    assert got[1]["target"] == ">= 10 (median)" and got[2]["min"] == 0.5


@pytest.mark.parametrize("amx", [False, True])
def test_targets_are_the_processors(amx: bool) -> None:
    [kernel, _, _, exchange, *_] = rows(Environments(), False, amx)
    bounds = {ratio.title: ratio.bound for ratio in kernel.ratios}
    for dim, with_amx in ((64, 1.6), (128, 1.35)):
        found = {
            bounds[t]
            for t in bounds
            if t.startswith("torch flash operator / ds_cp, bfloat16") and t.endswith(f"{dim}")
        }
        assert found == {with_amx if amx else 2.4}  # fmt: skip
    errors = [ratio for ratio in kernel.ratios if ratio.title.startswith("error")]
    assert len(errors) == 4 and {(e.bound, e.least) for e in errors} == {(1.0, False)}
    assert {ratio.by for ratio in exchange.ratios} == {"median"}


Played = Callable[..., int]


@pytest.fixture
def two_rows(contestant: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    """``make bench-peers`` of two rows that are played by scripts, before each of which others use
    so many processors. Returns the exit code."""

    def run(used: list[float], *argv: str, load: float = 0.0, **options: Any) -> int:
        made = [
            Row(name, f"row of {name}", {"ds_cp": contestant("ds_cp", took=1.0, **options)},
                {"seed": 1}, questions(1), [], 1.0)
            for name in NAMES[:2]
        ]  # fmt: skip
        shares = iter(used)
        monkeypatch.setattr(peers, "rows", lambda *_, **__: made)
        monkeypatch.setattr(peers, "machine", lambda: {"load": load, "date": "d", "machine": "m",
                                                       "python": "3"})  # fmt: skip
        monkeypatch.setattr(peers, "others", lambda: next(shares))
        return main(["--rows", *NAMES[:2], *argv])

    return run


def test_a_row_on_a_busy_machine_is_refused(
    two_rows: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    assert two_rows([0.1, MOST_LOAD + 1]) == 1
    out, err = capsys.readouterr()
    assert f"row of {NAMES[1]}: refused: others use 1.5 processors" in err
    assert "--even-if-busy" in err and f"no figure of ds_cp: row of {NAMES[1]}" in err
    assert "Refused: others use" in out and "| 256 tokens | ds_cp |" in out
    assert two_rows([9.0, 9.0], "--even-if-busy") == 0
    assert '"busy": true' in capsys.readouterr().out


def test_all_on_a_busy_machine_are_refused(two_rows: Played) -> None:
    assert two_rows([9.0, 9.0]) == 2
    assert two_rows([0.0, 9.0], load=9.0) == 2, "the load of the last minute, before the first"


def test_no_figure_of_our_own_is_a_failure(
    two_rows: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    assert two_rows([0.0, 0.0], fails=True) == 1
    err = capsys.readouterr().err
    assert err.count("no figure of ds_cp: ds_cp, 256 tokens: RuntimeError: no such thing here") == 2


def test_others_are_looked_for_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [100.0, 90.0, 0.0, 100.0]
    monkeypatch.setattr(measure.psutil, "cpu_percent", lambda _: shares.pop(0))
    assert measure.others() == 0.0 and len(shares) == 1


@pytest.mark.parametrize("quick", [False, True])
def test_rows_name_only_what_plays(quick: bool) -> None:
    found = rows(Environments(), quick)
    assert tuple(row.name for row in found) == NAMES
    assert sum(row.minutes for row in found) <= 40
    for row in found:
        playing = {(case.name, name) for case in row.cases for name in case.only or row.players}
        places = [place[:2] for ratio in row.ratios for place in (ratio.above, ratio.below)]
        assert set(places) <= playing


def played(row: Row, failed: str = "") -> Mapping[str, Any]:
    cases = {
        case.name: {
            name: {"failed": failed} if failed else {
                quantity: {"min": 0.5, "median": 1.0, "all": [0.5, 1.5]}
                for quantity in ("seconds", "ttft", "tpot")
            } for name in case.only or row.players
        } for case in row.cases
    }  # fmt: skip
    found = {
        case: {name: Figures(failed=failed) for name in names} for case, names in cases.items()
    }
    ratios = ratio_rows(row.ratios, found)
    return {"name": row.name, "title": row.title, "load": 0.1, "others": 0.0, "cases": cases,
            "ratios": ratios, "plot": "x.png", "same_tokens": {}}  # fmt: skip


def test_the_page_has_every_figure_and_every_failure(tmp_path: Path) -> None:
    found = rows(Environments(), False)
    result = {
        "command": "c", "date": "d", "commit": "", "machine": "m", "python": "3", "load": 3.0,
        "busy": True, "quick": True, "versions": {"torch": "2"},
        "rows": [played(found[1]), played(found[4], "it has | ended\nbadly")],
    }  # fmt: skip
    text = page(result)
    assert "failed: it has / ended badly" in text and "the machine was busy" in text.lower()
    for name in (*found[1].players, *found[4].players):
        assert f"| {name} |" in text
    one = dict(played(found[1]))
    one["cases"] = dict([*one["cases"].items()][:3])  # two sizes of one kind
    assert plot(one, "tokens", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not plot(played(found[3]), "", tmp_path / "q.png"), "nothing over a size"


def test_rows_of_a_head_change_places_for_llama_cpp() -> None:
    """Neighbours 2i and 2i + 1 there are rows i and i + dim / 2 here."""
    weight = torch.arange(16.0).view(16, 1)
    order = _rotate_in_pairs(weight, 2).flatten().tolist()
    assert order == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_peers_are_pinned() -> None:
    for peer in PEERS.values():
        assert all("==" in package for package in peer.packages if package != "numpy")
