"""Which tokens end an answer: generation_config, config and tokenizer together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedConfig

from ds_cp.facts import Facts
from ds_cp.model.end_tokens import describe_tokenizer, model_end_tokens
from ds_cp.model.loading import load_model
from ds_cp.model.source import find_model
from tests.helpers.engines import tiny_llama
from tests.helpers.tiny import EOS, make_tiny_model

FACTS = Facts(
    hosts=("here",), cp_size=1, tp_size=1, device="cpu", dtype="float32", kernel="sdpa",
    max_model_len=100, vocab_size=50, eos_token_ids=(), num_q_heads=2, num_kv_heads=1,
    block_size=4, blocks_per_rank=(30,), bytes_per_token=8, num_layers=1, threads=1,
    ranks_at_once=1, exactness=0.0, links=(), flops_per_s=1e9, weights=100, head_dim=4,
)  # fmt: skip
UNSTATED = object()


def model(config: Any, generation: Any) -> Any:
    """A model made in memory."""
    made = tiny_llama(hidden_size=16, intermediate_size=16, eos_token_id=config)
    assert made.generation_config is not None
    made.generation_config.eos_token_id = generation
    return made


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        (None, None, ()),
        (5, None, (5,)),
        (None, 7, (7,)),
        (5, 7, (5, 7)),
        (5, [7, 5], (5, 7)),
        ([9, 3], 7, (3, 7, 9)),
        (2, 7, (2, 7)),  # 2 is the class's own, but here somebody wrote it
    ],
)
def test_config_and_generation_config_together(
    config: Any, generation: Any, want: tuple[int, ...]
) -> None:
    assert model_end_tokens(model(config, generation)) == want


def test_a_gguf_file_is_not_read_as_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reader(path: str) -> dict[str, Any]:
        read.append(path)
        return {}

    monkeypatch.setattr(PreTrainedConfig, "_dict_from_json_file", reader)
    made = model(5, 7)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    made.config.name_or_path = str(file)
    assert model_end_tokens(made) == (5, 7) and read == []


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        (UNSTATED, UNSTATED, (2,)),
        (UNSTATED, [7, 9], (7, 9)),  # Llama's own 2 is any token here
        (2, [7, 9], (2, 7, 9)),
        (5, 7, (5, 7)),
        ([5, 6], UNSTATED, (5, 6)),
        (None, 7, (7,)),
    ],
)
def test_what_the_files_of_a_directory_state(
    tmp_path: Path, config: Any, generation: Any, want: tuple[int, ...]
) -> None:
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(tmp_path)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        file = tmp_path / name
        found = json.loads(file.read_text())
        found.pop("eos_token_id", None)
        if value is not UNSTATED:
            found["eos_token_id"] = value
        file.write_text(json.dumps(found))
        if name.startswith("generation") and value is UNSTATED:
            file.unlink()
    loaded = load_model(find_model(str(tmp_path)), torch.float32, torch.device("cpu"))
    assert model_end_tokens(loaded) == want


@pytest.mark.parametrize(
    ("named", "want"),
    [(None, ()), (3, (3,)), ([3, 8], (3, 8)), (True, ()), ("</s>", ()), ([None, 4], (4,))],
)
def test_what_a_tokenizer_names(named: Any, want: tuple[int, ...]) -> None:
    assert describe_tokenizer(SimpleNamespace(eos_token_id=named)) == (want, None)
    assert describe_tokenizer(None) == describe_tokenizer(object()) == ((), None)


def test_a_real_tokenizer(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))
    assert describe_tokenizer(tokenizer) == ((EOS,), 258)


def test_facts_beside_a_tokenizer() -> None:
    facts = Facts(**{**vars(FACTS), "eos_token_ids": (7, 3), "notes": ("before",)})
    assert facts.with_tokenizer((), None).eos_token_ids == (3, 7)
    found = facts.with_tokenizer((9, 7), 50)
    assert found.eos_token_ids == (3, 7, 9) and found.notes == ("before",)


def test_end_tokens_outside_the_vocabulary_are_ignored_with_a_line() -> None:
    facts = Facts(**{**vars(FACTS), "eos_token_ids": (7, 50)})
    found = facts.with_tokenizer((49, 128009, -1), 50)
    assert found.eos_token_ids == (7, 49)
    [note] = found.notes
    assert note == ("end tokens -1, 50, 128009 are ignored: the model's vocabulary has 50 tokens")


def test_a_tokenizer_larger_than_the_model_is_said() -> None:
    [note] = FACTS.with_tokenizer((), 51).notes
    assert "the tokenizer has 51 tokens, the model's vocabulary 50" in note
    assert FACTS.with_tokenizer((), 50).notes == FACTS.with_tokenizer((), None).notes == ()
