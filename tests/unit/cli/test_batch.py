"""``ds-cp batch`` over a fake engine: exit codes, files, running again, Ctrl-C, progress."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import signal
import sys
import types
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ds_cp.batch.runner import BatchReport
from ds_cp.cli import main as cli
from ds_cp.cli.batch import summary
from ds_cp.errors import CommError, DsCpError, EngineDeadError
from tests.helpers.batches import answer_line, line, opened
from tests.helpers.fake_engine import FakeEngine

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_CP_LAUNCHER", "OMPI_COMM_WORLD_RANK")


class Bench:
    """A folder with a config and an input; the command over a fake engine."""

    def __init__(self, folder: Path, engine: FakeEngine, capfd: Any) -> None:
        self.folder = folder
        self.engine = engine
        self.capfd = capfd
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.errors = folder / "out.jsonl.errors.jsonl"
        self.config = folder / "config.json"
        self.opened: list[Any] = []

    def run(self, *argv: str, output: str | None = None) -> int:
        target = output or str(self.output)
        return cli.main(["batch", str(self.input), target, "--config", str(self.config), *argv])

    @property
    def answers(self) -> dict[str, int]:
        """Ids and statuses; an id stands once."""
        lines = [json.loads(text) for text in self.output.read_bytes().splitlines()]
        found = {got["custom_id"]: (got["response"] or {}).get("status_code") for got in lines}
        assert len(found) == len(lines)
        return found


@pytest.fixture
def bench(tmp_path: Path, engine: FakeEngine, monkeypatch: Any, capfd: Any) -> Bench:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    raw = {"model": str(tmp_path / "model"), "server": {"api_key": "secret"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    bench = Bench(tmp_path, engine, capfd)

    @asynccontextmanager
    async def open_app(config: Any, job: Any) -> AsyncIterator[Any]:
        print("noise of a library")
        bench.opened.append((config, job))
        async with opened(bench.engine, api_key=config.server.api_key) as app:
            yield app

    module = types.ModuleType("ds_cp.serve.in_process")
    module.open_app = open_app  # type: ignore[attr-defined]
    module.follow = lambda config, job: 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ds_cp.serve.in_process", module)
    return bench


def test_command_answers_all(bench: Bench) -> None:
    bench.input.write_text("\n".join(line(f"{i}", [i]) for i in range(20)))
    assert bench.run("--concurrency", "3") == 0
    assert bench.answers == {f"{i}": 200 for i in range(20)}
    out, err = bench.capfd.readouterr()
    assert out == "" and "noise" in err
    assert "batch: 20 answered, 0 refused, 0 broken, in " in err and "60 tokens" in err
    assert not bench.errors.exists() and "\r" not in err  # no progress: not a terminal
    (_, job), *_ = bench.opened
    assert (job.rank, job.world_size) == (0, 1)


def test_a_trace_is_asked_for(bench: Bench) -> None:
    bench.input.write_text(line("a"))
    raw = json.loads(bench.config.read_text()) | {"trace": {"file": str(bench.folder / "t.json")}}
    bench.config.write_text(json.dumps(raw))
    assert bench.run() == 0
    assert bench.run("--trace", str(bench.folder / "u.json")) == 0
    files = [config.trace.file for config, _ in bench.opened]
    assert files == [str(bench.folder / name) for name in ("t.json", "u.json")]


def test_command_again_does_what_is_left(bench: Bench) -> None:
    bench.input.write_text("\n".join(line(f"{i}", [i]) for i in range(9)))
    assert bench.run() == 0
    whole = bench.output.read_bytes().splitlines(keepends=True)
    failed = answer_line(json.loads(whole[0])["custom_id"], 500)
    bench.output.write_bytes(failed + b"".join(whole[1:4]) + whole[4][:30])
    bench.engine.seen.clear()
    bench.capfd.readouterr()
    assert bench.run() == 0
    assert bench.answers == {f"{i}": 200 for i in range(9)} and len(bench.engine.seen) == 6
    err = bench.capfd.readouterr().err
    assert "6 answered, 0 refused, 0 broken, 3 skipped as done" in err
    assert "failed answers of an earlier run, now redone: 1" in err
    assert bench.output.read_bytes().splitlines(keepends=True)[:3] == whole[1:4]
    assert bench.run() == 0 and len(bench.engine.seen) == 6


def test_broken_and_refused_are_code_2_each_time(bench: Bench) -> None:
    lines = [line("a"), "{", line("b", temperature=7), line("a"), "", line("c")]
    bench.input.write_text("\n".join(lines))
    for skipped in (0, 3):
        assert bench.run("--json") == 2
        assert bench.answers == {"a": 200, "b": 400, "c": 200}
        out, err = bench.capfd.readouterr()
        got = json.loads(out)
        assert (got["broken"], got["skipped"], got["skipped_refused"]) == (
            2,
            skipped,
            skipped // 3,
        )
        assert (got["answered"], got["refused"]) == ((2, 1) if skipped == 0 else (0, 0))
        assert [item["line"] for item in got["first_broken"]] == [2, 4]
        assert got["errors"] == str(bench.errors) and got["stopped"] is None
        assert f"{bench.input} line 2 broken: not valid JSON at column 2" in err
        errors = [json.loads(text) for text in bench.errors.read_text().splitlines()]
        assert [(item["line"], item["custom_id"]) for item in errors] == [(2, None), (4, "a")]
        assert errors[1]["error"]["code"] == "duplicate_custom_id"
    bench.input.write_text(line("a"))  # corrected
    assert bench.run() == 0 and not bench.errors.exists()


def test_ctrl_c_leaves_whole_lines(bench: Bench) -> None:
    bench.input.write_text("\n".join(line(f"{i}", [i], max_tokens=1 + i % 5) for i in range(300)))
    bench.engine.delay_s = 0.01
    before = signal.getsignal(signal.SIGINT)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        start = len(bench.answers) if bench.output.exists() else 0
        interrupt_when(lambda n: n >= 12, bench, number)
        assert bench.run("--concurrency", "4") == code
        assert start + 3 <= len(bench.answers) < 300 and set(bench.answers.values()) == {200}
        assert not bench.engine.live
        err = bench.capfd.readouterr().err
        assert "batch: interrupted; run the same command again to do what is left" in err
    assert signal.getsignal(signal.SIGINT) is before
    bench.engine.delay_s = 0.0
    bench.engine.seen.clear()
    left = 300 - len(bench.answers)
    assert bench.run() == 0
    assert bench.answers == {f"{i}": 200 for i in range(300)} and len(bench.engine.seen) == left


def interrupt_when(reached: Callable[[int], bool], bench: Bench, number: int) -> None:
    """Send the signal once ``reached`` is true of the number of requests to the engine."""
    generate, count = FakeEngine.generate, 0

    def counting(*args: Any, **rest: Any) -> Any:
        nonlocal count
        count += 1
        if reached(count):
            bench.engine.__dict__.pop("generate", None)
            os.kill(os.getpid(), number)
        return generate(bench.engine, *args, **rest)

    bench.engine.generate = counting  # type: ignore[method-assign]


def test_ctrl_c_while_the_engine_starts(bench: Bench, monkeypatch: Any) -> None:
    left = []

    @asynccontextmanager
    async def open_app(config: Any, job: Any) -> AsyncIterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
            yield None
        finally:
            left.append(True)

    monkeypatch.setattr(sys.modules["ds_cp.serve.in_process"], "open_app", open_app)
    bench.input.write_text(line("a"))
    assert bench.run() == 130 and left == [True]
    assert "run the same command again" in bench.capfd.readouterr().err


def test_dead_engine_is_code_1(bench: Bench) -> None:
    bench.input.write_text(line("a"))
    bench.engine.break_after = (1, EngineDeadError("gone"))
    assert bench.run("--json") == 1
    out, err = bench.capfd.readouterr()
    assert err.splitlines()[-1] == (
        "ds_cp: error: the engine has stopped; run the same command again to do the rest"
    )
    assert json.loads(out)["stopped"] == "the engine has stopped"
    assert bench.output.read_bytes() == b""


def test_failures_are_code_1_and_redone(bench: Bench) -> None:
    bench.input.write_text(line("a") + "\n" + line("b", temperature=7))
    bench.engine.end = "error"
    assert bench.run() == 1
    assert bench.answers == {"a": 500, "b": 400}
    err = bench.capfd.readouterr().err
    assert "batch: 1 failed by a fault of ds_cp; the same requests would most likely fail" in err
    assert "line 1 failed: " in err and "run the same command again" not in err
    bench.engine.end = None
    assert bench.run() == 2 and bench.answers == {"a": 200, "b": 400}


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        (CommError("rank 1 is gone"), "; run the same command again to do the rest"),
        (EngineDeadError("KeyError"), " by a fault of ds_cp; the same command would most likely"),
    ],
)
def test_advice_depends_on_what_ended_the_engine(
    bench: Bench, monkeypatch: Any, cause: DsCpError, advice: str
) -> None:
    @asynccontextmanager
    async def open_app(config: Any, job: Any) -> AsyncIterator[Any]:
        async with opened(bench.engine, api_key=config.server.api_key) as app:
            app.state.deaths = [cause]
            yield app

    monkeypatch.setattr(sys.modules["ds_cp.serve.in_process"], "open_app", open_app)
    bench.input.write_text(line("a"))
    bench.engine.break_after = (1, EngineDeadError("gone"))
    assert bench.run() == 1
    last = bench.capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"ds_cp: error: the engine has stopped{advice}")


def test_advice_depends_on_how_requests_failed() -> None:
    passed, fault = BatchReport(failed=2, faults=0), BatchReport(failed=3, faults=1)
    assert summary(passed, "in", "out", None)[-1] == (
        "batch: 2 failed; run the same command again to do what is left"
    )
    *_, first, last = summary(fault, "in", "out", None)
    assert first.startswith("batch: 1 failed by a fault of ds_cp") and "2 failed; run" in last


def test_cause_of_the_engine_comes_after_the_summary(bench: Bench, monkeypatch: Any) -> None:
    @asynccontextmanager
    async def open_app(config: Any, job: Any) -> AsyncIterator[Any]:
        async with opened(bench.engine, api_key=config.server.api_key) as app:
            yield app
        raise EngineDeadError("the worker of rank 1 was ended by SIGKILL")

    monkeypatch.setattr(sys.modules["ds_cp.serve.in_process"], "open_app", open_app)
    bench.input.write_text(line("a"))
    assert bench.run() == 1
    *_, summary, last = bench.capfd.readouterr().err.splitlines()
    assert "1 answered" in summary and last.endswith("rank 1 was ended by SIGKILL")


def test_answers_on_stdout(bench: Bench) -> None:
    bench.input.write_text("\n".join([line("a"), "{", line("b")]))
    assert bench.run(output="-") == 2
    out, err = bench.capfd.readouterr()
    assert sorted(json.loads(text)["custom_id"] for text in out.splitlines()) == ["a", "b"]
    assert f"{bench.input} line 2: not valid JSON" in err
    assert sorted(os.listdir(bench.folder)) == ["config.json", "in.jsonl", "model"]


def test_other_ranks_follow_without_the_files(bench: Bench, monkeypatch: Any) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert bench.run() == 5
    assert not bench.output.exists() and bench.opened == []


def test_unusable_files_are_refused_at_once(bench: Bench) -> None:
    def refused(source: Path | str, target: Path | str, *argv: str) -> str:
        argv = ("batch", str(source), str(target), "--config", str(bench.config), *argv)
        assert cli.main(argv) == 2
        out, err = bench.capfd.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    folder, good = bench.folder, bench.input
    assert "cannot read" in refused(folder / "none", "-")
    good.write_text("")
    assert "is empty" in refused(good, "-")
    good.write_text(line("a"))
    os.mkfifo(folder / "fifo")
    assert "not a regular file" in refused(folder / "fifo", "-")
    assert "not a regular file" in refused(folder, "-")
    assert "IN must be a file" in refused("-", bench.output)
    assert "not a regular file" in refused(good, folder)
    assert "is IN itself" in refused(good, good)
    assert "there is no folder" in refused(good, folder / "none" / "out")
    assert "name a file" in refused(good, "-", "--json")
    assert "there is no folder" in refused(good, "-", "--trace", str(folder / "none" / "t"))
    (folder / "link").symlink_to(good)
    for trace in (good, folder / "link", bench.output):
        assert "is IN or OUT" in refused(good, bench.output, "--trace", str(trace))
    for wrong in ("0", "4097", "-1", "x", "9" * 5000, "²"):
        assert "--concurrency is" in refused(good, "-", f"--concurrency={wrong}")
    bench.output.write_text("my notes\n")
    assert "line 1 is not an answer of a batch" in refused(good, bench.output)
    bench.output.unlink()
    with open(bench.output, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "being written by another" in refused(good, bench.output)
    assert good.read_text() == line("a") and bench.opened == []


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [({"max_num_seqs": 3}, 6), ({"max_num_seqs": 3, "max_queue": 4}, 4)],
)
def test_auto_concurrency(
    bench: Bench, monkeypatch: Any, scheduler: dict[str, int], expected: int
) -> None:
    raw = json.loads(bench.config.read_text()) | {"scheduler": scheduler}
    bench.config.write_text(json.dumps(raw))
    bench.input.write_text("\n".join(line(f"{i}") for i in range(30)))
    now = most = 0
    generate = bench.engine.generate

    async def watching(*args: Any, **rest: Any) -> AsyncIterator[Any]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            async for delta in generate(*args, **rest):
                yield delta
        finally:
            now -= 1

    monkeypatch.setattr(bench.engine, "generate", watching)
    bench.engine.delay_s = 0.005
    assert bench.run() == 0 and most == expected


def test_progress_on_a_terminal(bench: Bench, monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    bench.input.write_text("\n".join(line(f"{i}") for i in range(12)))
    monkeypatch.setattr(sys, "stderr", terminal)
    assert bench.run() == 0
    shown = terminal.getvalue().split("\r")
    assert any("/12 done, " in text and "tokens/s" in text for text in shown)
    assert shown[-1].startswith("batch: 12 answered")
