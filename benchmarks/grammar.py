"""What structured output costs: a decode step with and without grammars, and a grammar's start.

One rank decodes ``--batch`` requests at once, free ones and constrained ones in turns, so that both
see the same machine. A step's time is the median of its run, and of the runs the least counts. The
masks are timed by themselves too: they are made beside the forward call, applied after it.

    python -m benchmarks.grammar
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, command, commit, finish, machine, parser
from ds_cp import init_inference
from ds_cp.engine.llm import LLMEngine
from ds_cp.grammar.checker import GrammarChecker
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.plan import Outcome, Plan, StepPlan
from ds_cp.sampling_params import SamplingParams
from ds_cp.worker.grammars import Grammars

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
KINDS: dict[str, StructuredOutputsParams] = {
    "schema": StructuredOutputsParams(
        json={"type": "array", "items": PERSON, "minItems": 200}, disable_any_whitespace=True
    ),
    "schema, white space": StructuredOutputsParams(
        json={"type": "array", "items": PERSON, "minItems": 200}
    ),
    "any JSON": StructuredOutputsParams(json={"type": "array", "minItems": 2000}),
    "regex": StructuredOutputsParams(regex=r"([a-z]{2,9} [0-9]{1,4}[.,;] ){400}"),
}
COMPILED: dict[str, StructuredOutputsParams] = {
    **KINDS,
    "10,000 values": StructuredOutputsParams(json={"enum": [f"v{n}" for n in range(10_000)]}),
    "200 optional keys": StructuredOutputsParams(
        json={"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(200)}}
    ),
}


class Steps:
    """Seconds of the steps that decode a whole batch."""

    def __init__(self, engine: LLMEngine, batch: int) -> None:
        self._run = engine._worker.run
        self._batch = batch
        self.seconds: list[float] = []
        engine._worker.run = self.run  # type: ignore[method-assign]

    def run(self, plan: Plan, began: float | None = None) -> Outcome:
        outcome = self._run(plan, began)
        if isinstance(plan, StepPlan) and not plan.chunks:
            if sum(len(decodes.requests) for decodes in plan.decodes) == self._batch:
                self.seconds.append(outcome.seconds)
        return outcome

    def median(self) -> float:
        """Milliseconds of a step since the last call; the first steps of a run do not count."""
        taken, self.seconds = self.seconds[4:], []
        return 1e3 * statistics.median(taken)


class Timed(Grammars):
    """Seconds of making the masks of one step, in their thread."""

    made: list[float] = []

    def _make(self, wishes: Any) -> Any:
        began = time.perf_counter()
        found = super()._make(wishes)
        self.made.append(time.perf_counter() - began)
        return found


def main(argv: list[str]) -> None:
    args = parser(__doc__)
    args.add_argument("--model", default=MODEL)
    args.add_argument("--batch", type=int, default=16)
    args.add_argument("--tokens", type=int, default=40, help="new tokens of each request")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--out", type=Path)
    given = args.parse_args(argv)
    facts = machine()
    config = {"model": given.model, "kv_cache": {"tokens_per_rank": 128 * given.batch}}
    engine = init_inference(config=config, env={})
    engine._worker._grammars = grammars = Timed()
    prompt = "Write a list of people as JSON."
    steps = Steps(engine, given.batch)

    def median(wanted: StructuredOutputsParams | None) -> float:
        params = [
            SamplingParams(
                max_tokens=given.tokens, seed=n, structured_outputs=wanted,
                ignore_eos=wanted is None,
            )
            for n in range(given.batch)
        ]  # fmt: skip
        engine.generate([prompt] * given.batch, params)
        return steps.median()

    rows: dict[str, dict[str, float]] = {}
    for name, wanted in KINDS.items():
        free, kept, made = [], [], []
        for _ in range(given.rounds):
            free.append(median(None))
            grammars.made = []
            kept.append(median(wanted))
            made.append(1e3 * statistics.median(grammars.made[4:]))
        rows[name] = {
            "free_step_ms": round(min(free), 2),
            "constrained_step_ms": round(min(kept), 2),
            "more_percent": round(100 * (min(kept) / min(free) - 1), 1),
            "masks_ms": round(min(made), 3),
        }
        print(json.dumps({name: rows[name]}), flush=True)
    result = {
        "benchmark": "grammar",
        "command": command("grammar", argv),
        "commit": commit(),
        **facts,
        "batch": given.batch,
        "steps": rows,
        "checked_ms": checks(engine.tokenizer),
    }
    engine.shutdown()
    finish(result, given.out)


def checks(tokenizer: Any) -> dict[str, float]:
    """Milliseconds until a new grammar is accepted; the first one starts the process too."""
    checker, found = GrammarChecker(tokenizer), {}
    first = StructuredOutputsParams(regex="a")
    for name, wanted in {"the first one": first, **COMPILED}.items():
        began = time.perf_counter()
        checker.check(wanted)
        found[name] = round(1e3 * (time.perf_counter() - began), 1)
    checker.close()
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
