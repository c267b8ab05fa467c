"""Answers under JSON schemas: valid by ``jsonschema``, and the same tokens on 1, 2 and 3 ranks.

The schemas are drawn from SchemaStore, which a package ships, and made at random. Each is answered
greedily and sampled by a tiny random model, which ends its answers because the tokens that close
them are made likelier. What the server refuses is counted by its reason; an answer that is cut at
its length all the same cannot be valid yet, and is counted too.

    python -m benchmarks.schemas --ranks 1 2 3
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import validator_for
from referencing.exceptions import Unresolvable

from benchmarks.common import RESULTS, command, commit, finish, machine, parser
from benchmarks.schemas.answers import Answer, answers, asked
from benchmarks.schemas.corpus import Schema, corpus
from ds_cp.errors import RequestError
from ds_cp.grammar.checker import GrammarChecker
from tests.helpers.ranks import run_ranks
from tests.helpers.schemas import Schemas
from tests.helpers.tiny import make_tiny_model


def random_ones(seed: int) -> Iterator[tuple[str, Schema]]:
    source = Schemas(seed)
    return ((f"random {n}", source.draw()) for n in itertools.count())


SOURCES: dict[str, Callable[[int], Iterable[tuple[str, Schema]]]] = {
    "schemastore": corpus,
    "random": random_ones,
}


def main(argv: Sequence[str]) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=500, help="schemas of each source")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    arguments.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    arguments.add_argument("--seed", type=int, default=2026)
    arguments.add_argument("--timeout-s", type=float, default=900, help="of one job")
    arguments.add_argument("--out", type=Path, default=RESULTS / "schemas.json")
    args = arguments.parse_args(argv)
    facts = machine() | {"commit": commit(), "command": command("schemas", argv)}
    found = kept(args.out)  # of sources that do not run now
    with tempfile.TemporaryDirectory() as name:
        folder = str(make_tiny_model(Path(name)))
        for source in args.sources:
            began = time.monotonic()
            chosen, refused = accepted(SOURCES[source](args.seed), folder, args.count)
            schemas = [schema for _, schema in chosen]
            results = {
                size: run_ranks(answers, size, folder, schemas, timeout=args.timeout_s)[0]
                for size in args.ranks
            }
            found[source] = facts | judged(chosen, results) | {"refused": refused}
            found[source]["seconds"] = round(time.monotonic() - began, 1)
    bad = sum(len(one["invalid"]) + len(one["different"]) for one in found.values())
    few = any(found[source]["schemas"] < args.count for source in args.sources)
    finish({"bad": bad, "sources": found}, args.out)
    return 1 if bad or few else 0


def kept(file: Path) -> dict[str, Any]:
    """The sources in a result that is there."""
    found: dict[str, Any] = json.loads(file.read_text())["sources"] if file.exists() else {}
    return found


def accepted(
    offered: Iterable[tuple[str, Schema]], folder: str, count: int
) -> tuple[list[tuple[str, Schema]], dict[str, int]]:
    """The first ``count`` schemas that the server takes; how many it refused, by reason."""
    from transformers import AutoTokenizer

    checker = GrammarChecker(AutoTokenizer.from_pretrained(folder))
    chosen: list[tuple[str, Schema]] = []
    refused: Counter[str] = Counter()
    for name, schema in offered:
        if len(chosen) == count:
            break
        try:
            validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
        except SchemaError:
            refused["no JSON schema by jsonschema"] += 1
            continue
        try:
            checker.check(asked(schema))
        except RequestError as err:
            refused[kind(str(err))] += 1
            continue
        chosen.append((name, schema))
    checker.close()
    return chosen, dict(refused.most_common())


def kind(reason: str) -> str:
    """A refusal without what it quotes."""
    text = reason.removeprefix("structured_outputs: ")
    for mark in ('"', "'", "["):
        head, quote, _ = text.partition(mark)
        text = head + quote.replace('"', "..").replace("'", "..").replace("[", "..")
    return text.strip()[:100]


def judged(
    chosen: Sequence[tuple[str, Schema]], results: dict[int, list[Answer]]
) -> dict[str, Any]:
    """What the answers of all ranks' numbers were worth."""
    first = next(iter(results.values()))
    ends: Counter[str] = Counter()
    invalid, characters = [], 0
    for n, (name, schema) in enumerate(chosen):
        for how, one in zip(("greedy", "sampled"), first[2 * n : 2 * n + 2], strict=True):
            _, text, reason = one
            ends[reason] += 1
            characters += len(text)
            why = wrong(schema, text) if reason == "stop" else ""
            if reason not in ("stop", "length"):
                why = f"ended with {reason}"
            if why:
                invalid.append({"schema": name, "how": how, "answer": text[:300], "why": why})
    different = [
        {"schema": chosen[n // 2][0], "ranks": size}
        for size, got in results.items()
        for n, (mine, theirs) in enumerate(zip(first, got, strict=True))
        if mine != theirs
    ]
    return {
        "schemas": len(chosen),
        "answers": len(first),
        "characters": characters,
        "ends": dict(ends),
        "valid": ends["stop"] - len(invalid),
        "ranks": list(results),
        "invalid": invalid,
        "different": different,
    }


def wrong(schema: Schema, text: str) -> str:
    """Why an answer is not valid; "" where it is."""
    try:
        validator_for(schema, jsonschema.Draft202012Validator)(schema).validate(json.loads(text))
    except ValidationError as err:
        return f"{err.validator}: {err.message}"[:300]
    except (ValueError, Unresolvable) as err:
        return f"{type(err).__name__}: {err}"[:300]
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
