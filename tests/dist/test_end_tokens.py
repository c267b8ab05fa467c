"""The tokenizer's end token ends an answer, whatever the engine runs in, and start-up says what of
a checkpoint is not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import ds_cp
from ds_cp.comm.wire import World
from ds_cp.model.loading import load_model
from ds_cp.model.source import find_model
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import EOS, make_tiny_model

CONFIG: dict[str, Any] = {"kv_cache": {"block_size": 4, "tokens_per_rank": 128}}
OTHER = 3  # the end token that config and generation_config of the fine-tune's base name
SAYS_EOS = {EOS: 100.0}  # a bias that makes the model say the tokenizer's end token


@pytest.fixture
def fine_tune(tmp_path: Path) -> Path:
    """A model whose tokenizer ends with another token than its configs name."""
    folder = make_tiny_model(tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": OTHER}))
    return folder


def ends(outputs: list[Any]) -> list[tuple[list[int], str | None]]:
    return [(list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs]


def biased(token: int, **more: Any) -> ds_cp.SamplingParams:
    return ds_cp.SamplingParams(max_tokens=6, temperature=0.0, logit_bias={token: 100.0}, **more)


def from_a_directory(world: World, folder: str) -> None:
    """Two ranks; only rank 0 has the tokenizer."""
    engine = engine_on(world, folder, CONFIG)
    found = engine.generate(
        ["Hello", [40, 41, 42], "Hello"], [biased(EOS), biased(OTHER), biased(5)]
    )
    ignored = engine.generate(["Hello"], [biased(EOS, ignore_eos=True)])
    if engine.is_driver:
        assert engine.facts.eos_token_ids == (OTHER, EOS)
        assert ends(found) == [([EOS], "stop"), ([OTHER], "stop"), ([5] * 6, "length")]
        assert ends(ignored) == [([EOS] * 6, "length")]


def from_an_object(world: World, folder: str) -> None:
    """A loaded model and the caller's tokenizer, or none: then only the configs' token ends."""
    model = load_model(find_model(folder), torch.float32, torch.device("cpu"))
    alone = engine_on(world, model, CONFIG)
    assert ends(alone.generate([[40, 41]], [biased(EOS)])) == [([EOS] * 6, "length")]
    engine = engine_on(world, model, CONFIG, AutoTokenizer.from_pretrained(folder))
    assert ends(engine.generate(["Hello"], [biased(EOS)])) == [([EOS], "stop")]
    assert ends(engine.generate(["Hello"], [biased(OTHER)])) == [([OTHER], "stop")]


def ids_beyond_the_vocabulary(world: World, _: str) -> None:
    model = tiny_llama(eos_token_id=[7, 200])
    engine = engine_on(world, model, CONFIG)
    assert engine.facts.eos_token_ids == (7,)
    assert "end tokens 200 are ignored: the model's vocabulary has 128 tokens" in engine.summary()
    assert ends(engine.generate([[1, 2]], [biased(7)])) == [([7], "stop")]


def unread_parts_are_in_the_summary(world: World, folder: str) -> None:
    engine = engine_on(world, folder, CONFIG)
    said = [line for line in engine.summary() if "not used" in line or "not read" in line]
    assert said == [
        "the weights are model.safetensors; other files beside them are not read: optimizer.pt",
        "of the checkpoint's tensors 1 are not used: vision_tower.* (1)",
    ]


def test_two_ranks_end_at_the_tokens_of_configs_and_tokenizer(fine_tune: Path) -> None:
    run_ranks(from_a_directory, 2, str(fine_tune))


def test_a_model_object_ends_at_the_tokens_of_the_callers_tokenizer(fine_tune: Path) -> None:
    run_ranks(from_an_object, 1, str(fine_tune))


def test_ids_beyond_the_vocabulary_end_nothing() -> None:
    run_ranks(ids_beyond_the_vocabulary, 1, "")


def test_start_up_says_what_is_not_used(fine_tune: Path) -> None:
    file = fine_tune / "model.safetensors"
    extra = {"vision_tower.head.weight": torch.ones(2)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    (fine_tune / "optimizer.pt").write_bytes(b"not to be opened")
    run_ranks(unread_parts_are_in_the_summary, 1, str(fine_tune))
