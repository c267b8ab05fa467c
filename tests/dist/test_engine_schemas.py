"""Answers to random JSON schemas are valid by ``jsonschema``, and the same on 1, 2 and 3 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from ds_cp.comm.wire import World
from tests.dist.test_engine_grammar import GREEDY, WARM, Ids, generate, make_engine, wish
from tests.helpers.ranks import run_ranks
from tests.helpers.schemas import Schema, Schemas
from tests.helpers.tiny import make_tiny_model

SCHEMAS = 500  # random ones, each answered greedily and sampled, by one rank
PART = 60  # of these, by several ranks


def schemas() -> list[Schema]:
    source = Schemas(2026)
    return [source.draw() for _ in range(SCHEMAS)]


def answers(world: World, folder: str, first: int, count: int) -> list[tuple[Ids, str, str]]:
    """Greedy and sampled answers to some of the schemas: ids, text and why they ended."""
    engine = make_engine(world, folder, 64 * 350, scheduler={"max_num_seqs": 64})
    chosen = schemas()[first : first + count]
    wishes = [
        wish(f"Answer {n}", {**how, "seed": n}, 300, json=schema, disable_any_whitespace=n % 8 > 0)
        for n, schema in enumerate(chosen, first)
        for how in (GREEDY, WARM)
    ]
    found = [output.outputs[0] for output in generate(engine, wishes)]
    return [(one.token_ids, one.text, str(one.finish_reason)) for one in found]


def test_answers_to_random_schemas_are_valid_and_the_same_on_all_ranks(tmp_path: Path) -> None:
    folder = str(make_tiny_model(tmp_path))
    alone = run_ranks(answers, 1, folder, 0, SCHEMAS, timeout=250)[0]
    cut = 0
    for n, schema in enumerate(schemas()):
        for _, text, reason in alone[2 * n : 2 * n + 2]:
            if reason == "length":
                cut += 1
                continue
            assert reason == "stop"
            jsonschema.validate(json.loads(text), schema)
    assert cut <= SCHEMAS // 10
    for size, first in ((2, 0), (3, PART)):
        got = run_ranks(answers, size, folder, first, PART, timeout=250)[0]
        assert got == alone[2 * first : 2 * (first + PART)]
