"""``ds-cp bench serve``: load on a running server, in a closed or an open loop."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from ds_cp.cli.bench.report import Figure, machine, report, within
from ds_cp.client.chat import first_model
from ds_cp.client.completions import Timed, timed_completion
from ds_cp.client.connection import Server
from ds_cp.errors import DsCpError, LaunchError, ServerError
from ds_cp.text import shorten

MAX_REQUESTS, MAX_WORDS, MAX_TOKENS = 1 << 20, 1 << 22, 1 << 22
MAX_AT_ONCE = 4096  # requests in flight; those of an open loop that come later wait
# Words of the prompts in flight, which have about 20 bytes each here while they are sent.
MAX_WORDS_AT_ONCE = 1 << 26
MAX_TIMES = 1 << 25  # tokens of all answers, whose times are kept in about 100 bytes each
THREAD_WORDS = 2048  # words of a prompt above which the streams go on while it is made
CONCURRENCY = 4
MAX_KINDS = 5  # different failures that are shown
WORDS = ("time", "river", "stone", "light", "house", "number", "water", "garden", "paper", "road",
         "music", "winter", "table", "forest", "letter", "bridge", "window", "island", "story",
         "engine", "metal", "silver", "morning", "circle", "valley", "harbour")  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What is asked for. ``rate``: requests a second of an open loop, None for a closed one of
    ``concurrency``."""

    requests: int
    words: int
    new_tokens: int
    concurrency: int
    rate: float | None
    seed: int
    ignore_eos: bool
    warmup: int


@dataclass
class Outcome:
    """What came of it. ``late``: seconds by which requests of an open loop were sent late."""

    answers: list[Timed] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    seconds: float = 0.0


def serve(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Load a server and print. Returns 0, or 1 when a request failed."""
    server = Server.of(args.url, args.api_key, args.timeout)
    load = _load(args)
    here = machine()
    model, outcome = asyncio.run(_run(server, args.model, load))
    settings = {
        "loop": "closed" if load.rate is None else "open", "requests": load.requests,
        "input_words": load.words, "output_len": load.new_tokens,
        **({"concurrency": load.concurrency} if load.rate is None else {"rate": load.rate}),
        "seed": load.seed, "warmup": load.warmup,
    }  # fmt: skip
    about = {
        "url": server.url, "model": model, "answered": len(outcome.answers),
        "failed": len(outcome.failures), "seconds": round(outcome.seconds, 6),
        "prompt_tokens": sum(answer.prompt_tokens for answer in outcome.answers),
        "completion_tokens": sum(answer.completion_tokens for answer in outcome.answers),
    }  # fmt: skip
    report("serve", settings, about, figures_of(outcome), as_json=args.json,
           notes=_kinds(outcome.failures), taken_on=here)  # fmt: skip
    return 1 if outcome.failures else 0


def _load(args: argparse.Namespace) -> Load:
    if args.rate is not None and args.concurrency is not None:
        raise LaunchError("--rate is an open loop and --concurrency a closed one; give one of them")
    if args.rate is not None and not (math.isfinite(args.rate) and 0 < args.rate <= 1e5):
        raise LaunchError(f"--rate is {args.rate:g}; it must be above 0, at most 100000 a second")
    given = CONCURRENCY if args.concurrency is None else args.concurrency
    load = Load(
        requests=within("--requests", args.requests, 1, MAX_REQUESTS),
        words=within("--input-len", args.input_len, 1, MAX_WORDS),
        new_tokens=within("--output-len", args.output_len, 1, MAX_TOKENS),
        concurrency=within("--concurrency", given, 1, MAX_AT_ONCE),
        rate=args.rate,
        seed=within("--seed", args.seed, -(1 << 62), 1 << 62),
        ignore_eos=not args.no_ignore_eos,
        warmup=within("--warmup", args.warmup, 0, MAX_REQUESTS),
    )
    if (words := load.words * load.concurrency) > MAX_WORDS_AT_ONCE and load.rate is None:
        raise LaunchError(
            f"--concurrency {load.concurrency} prompts of --input-len {load.words} are {words} "
            f"words at once; at most {MAX_WORDS_AT_ONCE} are kept in memory"
        )
    if (times := load.requests * load.new_tokens) > MAX_TIMES:
        raise LaunchError(
            f"--requests {load.requests} of --output-len {load.new_tokens} have the times of "
            f"{times} tokens; at most {MAX_TIMES} are kept in memory"
        )
    return load


async def _run(server: Server, model: str | None, load: Load) -> tuple[str, Outcome]:
    most = load.concurrency
    if load.rate is not None:
        most = max(1, min(MAX_AT_ONCE, MAX_WORDS_AT_ONCE // load.words))
    async with server.client(connections=most) as client:
        name = model or (await first_model(server, client))[0]
        bodies = _Bodies(name, load)
        if load.warmup:  # what is wrong with all requests is raised here
            warm = await _closed(server, client, bodies, load.warmup, min(most, load.concurrency))
            if not warm.answers:
                raise ServerError(f"every request before those that count failed: "
                                  f"{_kinds(warm.failures)[0]}")  # fmt: skip
        if load.rate is None:
            return name, await _closed(server, client, bodies, load.requests, load.concurrency)
        draw = random.Random(load.seed)
        return name, await _open(server, client, bodies, load.requests, load.rate, draw, most)


class _Bodies:
    """The requests' bodies, each made when it is asked for: the same ones by the seed."""

    def __init__(self, model: str, load: Load) -> None:
        self._model = model
        self._load = load
        self._next = 0

    async def next(self) -> dict[str, Any]:
        """The next one."""
        self._next += 1
        if self._load.words > THREAD_WORDS:
            return await asyncio.to_thread(self._make, self._next)
        return self._make(self._next)

    def _make(self, number: int) -> dict[str, Any]:
        load = self._load
        draw = random.Random(f"{load.seed} {number}")
        words = [f"{draw.randrange(1 << 40):x}", *draw.choices(WORDS, k=load.words - 1)]
        body: dict[str, Any] = {"model": self._model, "prompt": " ".join(words),
                                "temperature": 0.0, "max_tokens": load.new_tokens}  # fmt: skip
        return body | ({"ignore_eos": True} if load.ignore_eos else {})


async def _closed(
    server: Server, client: httpx.AsyncClient, bodies: _Bodies, count: int, at_once: int
) -> Outcome:
    """``at_once`` requests in flight, until ``count`` were answered."""
    outcome = Outcome()
    rest = iter(range(count))

    async def one_after_the_other() -> None:
        for _ in rest:
            await _one(server, client, await bodies.next(), outcome)

    began = time.perf_counter()
    await _all([asyncio.create_task(one_after_the_other()) for _ in range(at_once)])
    outcome.seconds = time.perf_counter() - began
    return outcome


async def _open(
    server: Server, client: httpx.AsyncClient, bodies: _Bodies, count: int, rate: float,
    draw: random.Random, at_once: int,
) -> Outcome:  # fmt: skip
    """``count`` requests at the times of a Poisson process; later where ``at_once`` are in
    flight."""
    outcome = Outcome()
    tasks: set[asyncio.Task[None]] = set()
    free = asyncio.Semaphore(at_once)

    def ended(task: asyncio.Task[None]) -> None:
        free.release()
        if not task.cancelled() and task.exception() is None:  # else ``_all`` raises it
            tasks.discard(task)

    began = due = time.perf_counter()
    try:
        for _ in range(count):
            due += draw.expovariate(rate)
            await free.acquire()
            body = await bodies.next()
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            outcome.late.append(max(0.0, time.perf_counter() - due))
            task = asyncio.create_task(_one(server, client, body, outcome))
            tasks.add(task)
            task.add_done_callback(ended)
            del body  # the task has it, and gives it up with its end
    finally:
        await _all(list(tasks))
    outcome.seconds = time.perf_counter() - began
    return outcome


async def _all(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for all; when one raises, or this is cancelled, the others are cancelled."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one(
    server: Server, client: httpx.AsyncClient, body: dict[str, Any], outcome: Outcome
) -> None:
    try:
        outcome.answers.append(await timed_completion(server, client, body))
    except DsCpError as err:
        outcome.failures.append(str(err))


def _kinds(failures: list[str]) -> list[str]:
    """The failures, each once with its number, the most frequent first."""
    counts: dict[str, int] = {}
    for text in failures:
        counts[shorten(text, 300)] = counts.get(shorten(text, 300), 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    lines = [f"failed, {count} times: {text}" for text, count in ordered[:MAX_KINDS]]
    return lines + ([f"and {len(ordered) - MAX_KINDS} other failures"] * (len(ordered) > MAX_KINDS))


def figures_of(outcome: Outcome) -> list[Figure]:
    """TTFT: to the first text. TPOT: mean time of each further token. Gap: between two parts of a
    stream."""
    answers, seconds = outcome.answers, outcome.seconds
    first = [a.times[0] * 1000 for a in answers if a.times]
    each = [
        (a.times[-1] - a.times[0]) / (a.completion_tokens - 1) * 1000
        for a in answers
        if a.times and a.completion_tokens > 1
    ]
    gaps = [(y - x) * 1000 for a in answers for x, y in zip(a.times, a.times[1:], strict=False)]
    found = [
        Figure("TTFT", "ms", first), Figure("TPOT", "ms", each), Figure("gap", "ms", gaps),
        Figure("whole", "ms", [a.end_s * 1000 for a in answers]),
    ]  # fmt: skip
    if outcome.late:
        found.append(Figure("sent late", "ms", [late * 1000 for late in outcome.late]))
    if answers and seconds > 0:
        tokens = sum(a.completion_tokens for a in answers)
        found += [
            Figure("tokens a second", "tokens/s", [tokens / seconds]),
            Figure("requests a second", "1/s", [len(answers) / seconds]),
        ]
    return [figure for figure in found if figure.values]
