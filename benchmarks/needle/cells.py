"""The prompts of the grid, and their answers as every rank computes them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_cp.comm.wire import World
from ds_cp.sampling_params import SamplingParams
from tests.helpers.engines import engine_on

NEW = 12  # tokens of an answer
BEGIN = "There is an important number hidden in a long text. Find it and remember it.\n\n"
NEEDLE = " The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = "\n\nWhat is the pass key? The pass key is"
NOISE = """The grass is green.|The sky is blue.|The sun is yellow.|Here we go.|There and back again.
The river runs to the sea.|A bird sits on the roof.|The bread is still warm.|It rained all night.
The old clock has stopped.|Children play in the yard.|The train was late.|Snow lies on the hills.
A dog barks far away.|The shop opens early.|The road turns left.|Someone plays the piano.
The lamp is lit.|The boat has a red sail.|Leaves fall in autumn.""".replace("\n", "|").split("|")


@dataclass(frozen=True)
class Cell:
    """One cell: tokens of prompt and answer together, and how deep the needle lies, in percent."""

    length: int
    depth: int

    @property
    def key(self) -> str:
        """Five digits, others in every cell."""
        return str(random.Random(1000 * self.length + self.depth).randrange(10_000, 100_000))


def prompt(cell: Cell, tokenizer: Any) -> list[int]:
    """The cell's prompt, of exactly its length less the answer. Raises ``ValueError`` where the
    question and the needle alone are longer."""
    begin, needle, question = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (BEGIN, NEEDLE.format(key=cell.key), QUESTION)
    )
    room = cell.length - NEW - len(begin) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"a length of {cell.length} tokens is {-room} too short")
    rng = random.Random(7)
    noise: list[int] = []
    while len(noise) < room:
        text = "".join(f" {rng.choice(NOISE)}" for _ in range(100))
        noise += tokenizer(text, add_special_tokens=False)["input_ids"]
    before = room * cell.depth // 100
    return [*begin, *noise[:before], *needle, *noise[before:room], *question]


def answers(
    world: World, model: str, config: Mapping[str, Any], prompts: Sequence[list[int]], threads: int
) -> list[tuple[tuple[int, ...], str, tuple[str, ...]]]:
    """Greedy tokens, text and the modes of each prompt's steps; run on every rank."""
    torch.set_num_threads(threads)
    engine = engine_on(world, model, config)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    outputs = engine.generate(list(prompts) if world.rank == 0 else [], params)
    return [
        (one.outputs[0].token_ids, one.outputs[0].text, tuple(sorted(one.metrics.modes)))
        for one in outputs
    ]


def found(cell: Cell, text: str) -> float:
    """How much of the key the answer begins with, from 0 to 1."""
    said = text.strip()
    same = 0
    for mine, theirs in zip(said, cell.key, strict=False):
        if mine != theirs:
            break
        same += 1
    return same / len(cell.key)
