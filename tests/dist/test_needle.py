"""A tiny needle in a haystack: depth by length up to the model's limit, the same on 1 and 4 ranks
and by transformers. ``python -m benchmarks.needle`` does it with a real model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.needle.cells import NEW, Cell, answers, found, prompt
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import POSITIONS, make_tiny_model

CELLS = [Cell(length, depth) for length in (220, 365, POSITIONS) for depth in (0, 50, 100)]


@dataclass(frozen=True)
class OtherKey(Cell):
    """The same cell with another needle."""

    @property
    def key(self) -> str:
        return super().key[::-1]


@torch.inference_mode()
def greedy(folder: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for ids in prompts:
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
        found.append(tuple(whole[0, len(ids) :].tolist()))
    return found


def test_every_cell_has_the_same_answer_on_one_rank_and_on_four(tmp_path: Path) -> None:
    folder = str(make_tiny_model(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt(cell, tokenizer) for cell in CELLS]
    assert [len(ids) for ids in prompts] == [cell.length - NEW for cell in CELLS]
    prompts += [prompt(OtherKey(cell.length, cell.depth), tokenizer) for cell in CELLS]
    want = greedy(folder, prompts)
    for ranks, tokens in ((1, POSITIONS), (4, 160)):
        kv = {"block_size": 16, "tokens_per_rank": tokens, "prefix_caching": False}
        got = run_ranks(answers, ranks, folder, {"kv_cache": kv}, prompts, 1)[0]
        assert [row[0] for row in got] == want
    spanning = [bool({"ring", "tree"} & set(modes)) for _, _, modes in got]
    assert all(spanning[n] for n, cell in enumerate(CELLS) if cell.length > 160)
    # The needle matters to an answer: another key, another answer.
    half = len(CELLS)
    assert sum(a != b for a, b in zip(want[:half], want[half:], strict=True)) > half // 2


@pytest.mark.parametrize(
    ("text", "part"), [(" {key}.", 1.0), ("{key}", 1.0), (" x", 0.0), ("", 0.0)]
)
def test_what_counts_as_found(text: str, part: float) -> None:
    cell = Cell(512, 50)
    assert found(cell, text.format(key=cell.key)) == part
    assert found(cell, cell.key[:2]) == 0.4


def test_a_length_without_room_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))
    with pytest.raises(ValueError, match="50 tokens is 1.. too short"):
        prompt(Cell(50, 0), tokenizer)
