"""``ds-cp batch``: a file of requests in, a file of answers out, in OpenAI's batch format."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from ds_cp.batch.asgi_client import Headers
from ds_cp.batch.files import AnswerFile, ErrorFile, open_answers
from ds_cp.batch.format import Problem, read_requests
from ds_cp.batch.resumable import ResumableLines
from ds_cp.batch.runner import INTERRUPTED, BatchReport, run_batch
from ds_cp.cli.job import find_job, job_config, start_ranks, starts_ranks
from ds_cp.cli.output import own_stdout, say, unwritable, writing
from ds_cp.cli.signals import caught
from ds_cp.config import Config
from ds_cp.errors import CommError, DsCpError, EngineDeadError, LaunchError, RequestError
from ds_cp.process import importing
from ds_cp.startup.resources import socket_environment
from ds_cp.text import shorten
from ds_cp.topology.job import Job, peek_rank

STDOUT = "-"  # OUT: answers go to stdout
# Seconds that ranks get after a signal to cut off what is in flight and leave.
STOP_S = 15.0
MAX_CONCURRENCY = 4096  # requests in flight
ENVELOPE_BYTES = 1 << 16  # bytes of a line around its body, at most
COUNTED_BYTES = 1 << 30  # bytes of IN whose lines are counted for the progress line, at most


def batch(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Answer every line of a file. Returns the exit code."""
    config = job_config(args, {"trace.file": args.trace}, env)
    concurrency = _concurrency(args.concurrency, config)
    if peek_rank(env) == 0:  # only rank 0's host needs the files
        _check_paths(args, config.trace.file)
    if starts_ranks(args, env):
        return start_ranks(args, config, env, STOP_S)
    job = find_job(config, env)
    for variable, value in socket_environment(job).items():
        os.environ.setdefault(variable, value)
    with own_stdout() as out:
        if job.rank == 0:
            code = _Lead(args, config, job, concurrency, out).run()
        else:
            with importing():
                from ds_cp.serve.in_process import follow

            code = follow(config, job)
    return code


def _concurrency(given: str, config: Config) -> int:
    if given == "auto":
        return min(2 * config.scheduler.max_num_seqs, config.scheduler.max_queue, MAX_CONCURRENCY)
    if not (given.isascii() and given.isdecimal() and 1 <= int(given[:9]) <= MAX_CONCURRENCY):
        raise LaunchError(
            f"--concurrency is {shorten(given)}; it must be auto or from 1 to {MAX_CONCURRENCY}"
        )
    return int(given[:9])


def _check_paths(args: argparse.Namespace, trace: str | None) -> None:
    """Refuse, before anything is started, files that cannot be worked with."""
    source, target = args.input, args.output
    if source == STDOUT:
        raise LaunchError("IN must be a file, not -: to resume, a batch is read again")
    try:
        facts = os.stat(source)
        if not stat.S_ISREG(facts.st_mode):
            raise LaunchError(f"{source} is not a regular file: to resume, a batch is read again")
        with open(source, "rb"):
            pass
    except OSError as err:
        raise LaunchError(f"cannot read {source}: {err.strerror or err}") from None
    if facts.st_size == 0:
        raise RequestError(f"{source} is empty; give one request a line")
    if target == STDOUT:
        if args.json:
            raise LaunchError("--json prints on stdout, where OUT - has the answers; name a file")
    elif Path(target).exists():
        if not Path(target).is_file():
            raise LaunchError(f"{target} is not a regular file; answers go to a file, or to -")
        if os.path.samefile(source, target):
            raise LaunchError(f"{target} is IN itself; name another file for the answers")
    elif not Path(target).absolute().parent.is_dir():
        raise LaunchError(f"cannot write {target}: there is no folder {Path(target).parent}")
    if trace is not None and os.path.realpath(trace) in map(os.path.realpath, (source, target)):
        raise LaunchError(f"the trace would replace {trace}, which is IN or OUT; name another file")


class _Lead:
    """Rank 0: the files, the signals, the report."""

    def __init__(
        self, args: argparse.Namespace, config: Config, job: Job, concurrency: int, out: TextIO
    ) -> None:
        self._args = args
        self._config = config
        self._job = job
        self._concurrency = concurrency
        self._out = out
        self._received: list[int] = []
        self._report = BatchReport()  # of the lines done so far
        self._deaths: list[DsCpError] = []  # what the engine has stopped of

    def run(self) -> int:
        source, target = self._args.input, self._args.output
        if target == STDOUT:
            answers, errors = AnswerFile(self._out.fileno(), "stdout", None), None
        else:
            answers, errors = open_answers(target), ErrorFile(f"{target}.errors.jsonl")
        try:
            with open(source, "rb") as file:
                if answers.again:
                    say(f"{target}: failed answers of an earlier run, now redone: {answers.again}")
                self._report = asyncio.run(self._answer(file, answers, errors))
        except asyncio.CancelledError:  # a signal while the engine started or left
            self._report = dataclasses.replace(self._report, stopped=INTERRUPTED)
        except BaseException as err:
            if self._report.lines:  # else the error says it all
                self._summarize(errors)
            if isinstance(err, BrokenPipeError) and target == STDOUT:
                raise unwritable(err) from None
            raise
        finally:
            answers.close()
            if errors is not None:
                errors.close()
        self._summarize(errors)
        report = self._report
        if self._received and report.stopped == INTERRUPTED:
            return 128 + self._received[0]
        if report.stopped is not None:
            raise EngineDeadError(report.stopped + after_stop(self._deaths, target))
        if report.failed:
            return 1
        return 2 if report.refused or report.skipped_refused or report.broken else 0

    async def _answer(
        self, file: BinaryIO, answers: AnswerFile, errors: ErrorFile | None
    ) -> BatchReport:
        with importing():
            from ds_cp.serve.in_process import open_app

        server = self._config.server
        keys: Headers = ()
        if server.api_keys:
            keys = ((b"authorization", f"Bearer {server.api_keys[0]}".encode()),)
        stop = asyncio.Event()
        running = False
        task = asyncio.current_task()
        assert task is not None

        def on_signal(number: int) -> None:
            self._received.append(number)
            stop.set()
            if not running or len(self._received) > 1:
                task.cancel()

        def on_broken(problem: Problem) -> None:
            if errors is None:
                say(f"{self._args.input} line {problem.line}: {problem.message}")
            else:
                errors.add(problem)

        def on_progress(report: BatchReport) -> None:
            self._report = report
            show(report)

        shown = self._out if self._args.output == STDOUT else None
        with _progress(self._args.input, shown) as show, caught(on_signal):
            async with open_app(self._config, self._job) as app:
                running = True
                self._deaths = getattr(app.state, "deaths", [])
                journal = getattr(app.state, "journal", None)
                target = self._args.output  # answers on stdout begin anew each time
                lines = (
                    None
                    if journal is None or target == STDOUT
                    else (ResumableLines(journal, target))
                )
                try:
                    return await run_batch(
                        app,
                        read_requests(file, server.max_body_bytes + ENVELOPE_BYTES),
                        answers.append,
                        concurrency=self._concurrency,
                        on_broken=on_broken,
                        done=answers.done,
                        headers=keys,
                        stop=stop,
                        on_progress=on_progress,
                        resumable=lines,
                    )
                finally:
                    running = False

    def _summarize(self, errors: ErrorFile | None) -> None:
        report, source, target = self._report, self._args.input, self._args.output
        path = errors.path if errors is not None and errors.used else None
        for line in summary(report, source, target, path):
            say(line)
        if self._args.json:
            plain = dataclasses.asdict(report) | {"output": target, "errors": path}
            with writing(self._out):
                self._out.write(json.dumps(plain) + "\n")


def summary(report: BatchReport, source: str, target: str, errors: str | None) -> list[str]:
    """Lines for people: the counts of a batch, and the first lines that went wrong."""
    rate = report.completion_tokens / report.seconds if report.seconds else 0.0
    counts = [f"{report.answered} answered", f"{report.refused} refused"]
    counts += [f"{report.failed} failed"] if report.failed else []
    counts += [f"{report.broken} broken"]
    if report.skipped:
        refused = f" ({report.skipped_refused} refused)" if report.skipped_refused else ""
        counts.append(f"{report.skipped} skipped as done{refused}")
    lines = [
        f"batch: {', '.join(counts)}, in {report.seconds:.1f} s; "
        f"{report.completion_tokens} tokens, {rate:.1f} tokens/s"
    ]
    for what, count, first, where in (
        ("broken", report.broken, report.first_broken, errors),
        ("refused", report.refused, report.first_refused, target),
        ("failed", report.failed, report.first_failed, target),
    ):
        lines += [f"  {source} line {item.line} {what}: {item.message}" for item in first]
        if count > len(first) and where is not None:
            lines.append(f"  and {count - len(first)} more {what}, see {where}")
    if errors is not None:
        lines.append(f"  broken lines are in {errors}")
    if report.faults:
        lines.append(
            f"batch: {report.faults} failed by a fault of ds_cp; "
            "the same requests would most likely fail again, please report it"
        )
    passing = report.failed - report.faults
    if target != STDOUT and (passing or report.stopped == INTERRUPTED):
        how = report.stopped or f"{passing} failed"
        lines.append(f"batch: {how}; run the same command again to do what is left")
    return lines


def after_stop(deaths: Sequence[DsCpError], target: str) -> str:
    """What to do about an engine that has stopped, by the error that ended it, where it is known:
    a rank that was lost may be there the next time, a fault would end the engine again."""
    if any(not isinstance(err, CommError) for err in deaths):
        return (
            " by a fault of ds_cp; the same command would most likely stop again, please report it"
        )
    return "" if target == STDOUT else "; run the same command again to do the rest"


@contextlib.contextmanager
def _progress(source: str, answers: TextIO | None) -> Iterator[Callable[[BatchReport], None]]:
    """A function that shows a report on one line of stderr; it does nothing where stderr is no
    terminal, or where the answers go to one, in whose way it would be."""
    if not sys.stderr.isatty() or (answers is not None and answers.isatty()):
        yield lambda report: None
        return
    total = _count_lines(source)
    of = f"/{total}" if total is not None else ""
    next_at = 0.0

    def show(report: BatchReport) -> None:
        nonlocal next_at
        now = time.monotonic()
        if now < next_at:
            return
        next_at = now + 0.2
        rate = report.completion_tokens / report.seconds if report.seconds else 0.0
        text = f"{report.lines}{of} done, {rate:.1f} tokens/s"
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if next_at:
            print(f"\r{'':<60}\r", end="", file=sys.stderr, flush=True)


def _count_lines(source: str) -> int | None:
    """Lines of a file; ``None`` above ``COUNTED_BYTES``, since counting reads it whole."""
    if os.path.getsize(source) > COUNTED_BYTES:
        return None
    count, last = 0, b"\n"
    with open(source, "rb") as file:
        while part := file.read(1 << 20):
            count += part.count(b"\n")
            last = part
    return count + (not last.endswith(b"\n"))
