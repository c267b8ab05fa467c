"""``ds-cp bench latency`` and ``throughput``: an engine in the processes of this job."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_cp.cli.bench.report import MAX_ROUNDS, Figure, machine, report, within
from ds_cp.cli.generate import STOP_S, ended_by_ctrl_c
from ds_cp.cli.job import find_job, job_config, start_ranks, starts_ranks
from ds_cp.cli.output import own_stdout, say
from ds_cp.errors import RequestError
from ds_cp.outputs import RequestOutput
from ds_cp.process import importing
from ds_cp.sampling_params import SamplingParams

MAX_TOKENS, MAX_REQUESTS = 1 << 24, 1 << 16
Prompts = list[list[int]]
# Prompts of a round: its number and the vocabulary's size are given.
Make = Callable[[int, int], Prompts]
Look = Callable[[Sequence[RequestOutput], float], dict[str, list[float]]]
UNITS = {"requests a second": "1/s", "tokens a second": "tokens/s",
         "prompt and answer tokens a second": "tokens/s"}  # fmt: skip


def latency(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """One batch at a time. Returns the exit code."""
    size = within("--batch", args.batch, 1, MAX_REQUESTS)
    length = within("--input-len", args.input_len, 1, MAX_TOKENS)

    def make(number: int, vocabulary: int) -> Prompts:
        draw = random.Random(number)
        return [_tokens(draw, length, vocabulary) for _ in range(size)]

    def look(outputs: Sequence[RequestOutput], seconds: float) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "whole": []}
        for output in outputs:
            metrics = output.metrics
            first, last = metrics.first_token_time, metrics.finished_time
            count = len(output.outputs[0].token_ids)
            if first is None or last is None:
                continue
            found["TTFT"].append((first - metrics.arrival_time) * 1000)
            found["whole"].append((last - metrics.arrival_time) * 1000)
            if count > 1:
                found["TPOT"].append((last - first) / (count - 1) * 1000)
        return found

    asked = {"batch": size, "input_len": length}
    return _measure("latency", args, env, asked, make, look)


def throughput(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """All requests at once. Returns the exit code."""
    requests = within("--requests", args.requests, 1, MAX_REQUESTS)
    mean = within("--input-len", args.input_len, 1, MAX_TOKENS)

    def make(number: int, vocabulary: int) -> Prompts:
        draw = random.Random(number)
        low, high = max(1, mean // 2), mean + mean // 2
        lengths = [low + (high - low) * i // max(1, requests - 1) for i in range(requests)]
        draw.shuffle(lengths)
        return [_tokens(draw, length, vocabulary) for length in lengths]

    def look(outputs: Sequence[RequestOutput], seconds: float) -> dict[str, list[float]]:
        answers = sum(len(output.outputs[0].token_ids) for output in outputs)
        prompts = sum(len(output.prompt_token_ids) for output in outputs)
        return {
            "tokens a second": [answers / seconds],
            "prompt and answer tokens a second": [(answers + prompts) / seconds],
            "requests a second": [len(outputs) / seconds],
            "round": [seconds * 1000],
        }

    asked = {"requests": requests, "input_len": mean}
    return _measure("throughput", args, env, asked, make, look)


def _tokens(draw: random.Random, length: int, vocabulary: int) -> list[int]:
    return [draw.randrange(vocabulary) for _ in range(length)]


def _measure(
    kind: str, args: argparse.Namespace, env: Mapping[str, str], asked: Mapping[str, Any],
    make: Make, look: Look,
) -> int:  # fmt: skip
    new = within("--output-len", args.output_len, 1, MAX_TOKENS)
    warmup = within("--warmup", args.warmup, 0, MAX_ROUNDS)
    repeats = within("--repeats", args.repeats, 1, MAX_ROUNDS)
    config = job_config(args, {}, env)
    if starts_ranks(args, env):
        return start_ranks(args, config, env, STOP_S)
    here = machine()  # before this adds its own load
    job = find_job(config, env)
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    found: dict[str, list[float]] = {}
    with ended_by_ctrl_c(), own_stdout():
        with importing():
            from ds_cp.engine.llm import init_inference

        engine = init_inference(config.model, config, job=job, env=env)
        try:
            facts = engine.facts
            if engine.is_driver:
                say("\n".join(engine.summary()))
                _check_length(asked, new, facts.max_model_len)
            for number in range(warmup + repeats):
                prompts = make(number, facts.vocab_size) if engine.is_driver else []
                began = time.perf_counter()
                outputs = engine.generate(list(prompts), params)
                seconds = time.perf_counter() - began
                if engine.is_driver and number >= warmup:
                    for name, values in look(outputs, seconds).items():
                        found.setdefault(name, []).extend(values)
            driver = engine.is_driver
        finally:
            engine.shutdown()
    if driver:
        settings = {**asked, "output_len": new, "warmup": warmup, "repeats": repeats}
        about = {
            "model": config.model, "ranks": job.world_size, "hosts": len(set(facts.hosts)),
            "device": facts.device, "dtype": facts.dtype, "kernel": facts.kernel,
            "threads": facts.threads,
        }  # fmt: skip
        figures = [Figure(n, UNITS.get(n, "ms"), values) for n, values in found.items() if values]
        report(kind, settings, about, figures, as_json=args.json, taken_on=here)
    return 0


def _check_length(asked: Mapping[str, Any], new: int, most: int) -> None:
    longest = asked["input_len"] + (asked["input_len"] // 2 if "requests" in asked else 0)
    if longest + new > most:
        raise RequestError(
            f"prompts of up to {longest} tokens and answers of {new} are more than the {most} of "
            "this model here; lower --input-len or --output-len"
        )
