"""``ds-cp generate``: prompts in, text or JSON lines out, on rank 0 whatever the launcher."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ds_cp.cli.job import find_job, job_config, start_ranks, starts_ranks
from ds_cp.cli.output import own_stdout, say, writing
from ds_cp.cli.prompts import Prompts, read_prompts
from ds_cp.outputs import RequestOutput
from ds_cp.process import importing
from ds_cp.topology.job import peek_rank

STOP_S = 10.0  # seconds that ranks get after a signal to leave


def generate(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Complete every prompt and print the results. Returns the exit code."""
    config = job_config(args, {"trace.file": args.trace}, env)
    # Only rank 0's host needs the file: the other ranks follow rank 0.
    prompts = read_prompts(args) if peek_rank(env) == 0 else Prompts()
    if starts_ranks(args, env):
        return start_ranks(args, config, env, STOP_S)
    job = find_job(config, env)
    with ended_by_ctrl_c(), own_stdout() as out:
        with importing():
            from ds_cp.engine.llm import init_inference

        engine = init_inference(config.model, config, job=job, env=env)
        try:
            if engine.is_driver:
                say("\n".join(engine.summary()))
            outputs = engine.generate(
                list(prompts.texts), list(prompts.params), progress=sys.stderr.isatty()
            )
            if engine.is_driver:
                write = write_json if args.json else write_text
                with writing(out):
                    write(outputs, out)
        finally:
            engine.shutdown()
    return 0


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Inside the block, Ctrl-C ends this rank by the signal's default action. Python's own handler
    would not run while the rank waits in a collective, and results are written only at the end, so
    nothing is lost."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def write_json(outputs: Sequence[RequestOutput], out: TextIO) -> None:
    """One JSON object a line, with ``RequestOutput``'s fields."""
    for output in outputs:
        plain = _finite(dataclasses.asdict(output))
        out.write(json.dumps(plain, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity: the log-probability of an impossible token becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(outputs: Sequence[RequestOutput], out: TextIO) -> None:
    """The completions alone; a headline each when there are several."""
    several = sum(len(output.outputs) for output in outputs) > 1
    for number, output in enumerate(outputs, start=1):
        for completion in output.outputs:
            if several:
                out.write(f"--- prompt {number} of {len(outputs)}, {completion.finish_reason}\n")
            out.write(completion.text + "\n")
