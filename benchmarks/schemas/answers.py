"""Constrained answers of a tiny random model, as every rank computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.schemas.corpus import Schema
from ds_cp.comm.wire import World
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.sampling_params import SamplingParams
from tests.helpers.engines import engine_on
from tests.helpers.tiny import EOS, POSITIONS

NEW = POSITIONS - 24  # tokens of an answer, each of one byte
AT_ONCE = 64
HOW: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 1.3, "top_k": 40})
CLOSING = '"]}'
LIKELIER = (3.0, 30.0)  # added to the logits of tokens that close something, try by try

Answer = tuple[tuple[int, ...], str, str]  # ids, text, why it ended


def asked(schema: Schema) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema, disable_any_whitespace=True)


def answers(world: World, folder: str, schemas: Sequence[Schema]) -> list[Answer]:
    """Two answers to each schema, one after the other; run on every rank.

    What is cut at its length is asked once more, with what closes it far likelier.
    """
    kv = {"block_size": 16, "tokens_per_rank": AT_ONCE * POSITIONS}
    engine = engine_on(world, folder, {"kv_cache": kv, "scheduler": {"max_num_seqs": AT_ONCE}})
    wishes = [(n, schema, how) for n, schema in enumerate(schemas) for how in HOW]
    found: list[Answer] = [((), "", "length")] * len(wishes)
    for likelier in LIKELIER:
        left = [place for place, (_, _, reason) in enumerate(found) if reason == "length"]
        if world.rank:
            engine.generate([], [])
            continue
        prompts = [f"Answer {wishes[place][0]}" for place in left]
        params = [sampling(engine.tokenizer, *wishes[place], likelier) for place in left]
        for place, output in zip(left, engine.generate(prompts, params), strict=True):
            one = output.outputs[0]
            found[place] = (one.token_ids, one.text, str(one.finish_reason))
    return found


def sampling(
    tokenizer: Any, seed: int, schema: Schema, how: dict[str, Any], likelier: float
) -> SamplingParams:
    closing = {tokenizer.convert_tokens_to_ids(char): likelier for char in CLOSING}
    return SamplingParams(
        max_tokens=NEW,
        seed=seed,
        logit_bias=closing | {EOS: likelier},
        structured_outputs=asked(schema),
        **how,
    )
