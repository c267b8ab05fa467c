"""Which files of a directory are the model: the index decides, and what lies beside it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_cp.errors import ModelError
from ds_cp.model.checkpoint import INDEX, WHOLE, read_checkpoint
from ds_cp.model.loading import load_config, load_model
from ds_cp.model.source import find_model
from tests.helpers.engines import tiny_llama

CPU = torch.device("cpu")
META = {"format": "pt"}
SIZES = {"hidden_size": 16, "intermediate_size": 16}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A directory with one whole file."""
    path = tmp_path / "whole"
    tiny_llama(seed=1, **SIZES).save_pretrained(path)
    return path


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    """The same weights in two shards with their index."""
    path = tmp_path / "shards"
    shutil.copytree(whole, path)
    weights = load_file(path / WHOLE)
    (path / WHOLE).unlink()
    names = sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(SHARDS, halves, strict=True):
        save_file({name: weights[name] for name in half}, path / file, metadata=META)
    listed = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    write_index(path, listed)
    return path


def write_index(folder: Path, listed: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def index_of(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def loaded(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    notes: list[str] = []
    model = load_model(find_model(str(folder)), torch.float32, CPU, notes.append)
    return model.state_dict(), notes


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in want.items())


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_the_header_of_every_file_is_read(shards: Path) -> None:
    found = read_checkpoint(shards)
    assert found.index == INDEX and found.files == SHARDS and found.notes == ()
    want = load_file(shards / SHARDS[0]) | load_file(shards / SHARDS[1])
    assert {name: (t.dtype, t.shape) for name, t in found.tensors.items()} == {
        name: ("F32", tuple(value.shape)) for name, value in want.items()
    }
    assert {name: t.file for name, t in found.tensors.items()} == index_of(shards)


def test_the_index_decides_over_a_whole_file_of_other_weights(shards: Path, whole: Path) -> None:
    want = load_file(whole / WHOLE)
    other = tiny_llama(seed=2, **SIZES).state_dict()
    save_file({k: v.contiguous() for k, v in other.items()}, shards / WHOLE, metadata=META)
    found, [note] = loaded(shards)
    assert same(found, want)
    assert note == (
        f"the weights are the 2 files that {INDEX} lists; other files beside them are not read: "
        f"{WHOLE}"
    )


def test_an_index_beside_a_whole_file_that_names_a_missing_shard(shards: Path, whole: Path) -> None:
    shutil.copy(whole / WHOLE, shards)
    (shards / SHARDS[1]).unlink()
    message = refusal(shards)
    assert f"{SHARDS[1]} is missing (listed by {INDEX})" in message
    assert f"remove {INDEX} if {WHOLE} is the model" in message


def test_files_of_something_else_are_not_read_and_said(whole: Path) -> None:
    want = load_file(whole / WHOLE)
    (whole / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    junk = {"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(2, 2)}
    save_file(junk, whole / "adapter_model.safetensors", metadata=META)
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, whole / "consolidated.safetensors")
    for name in ("optimizer.pt", "pytorch_model.bin", "a.gguf", "b.gguf"):
        (whole / name).write_bytes(b"not to be opened")
    found, [note] = loaded(whole)
    assert same(found, want)
    assert note == (
        f"the weights are {WHOLE}; other files beside them are not read: a.gguf, "
        "adapter_model.safetensors, b.gguf and 3 more"
    )


def test_a_shard_that_holds_what_the_index_puts_elsewhere(shards: Path) -> None:
    listed = index_of(shards)
    first = next(name for name, file in listed.items() if file == SHARDS[0])
    write_index(shards, listed | {first: SHARDS[1]})
    message = refusal(shards)
    assert f"{SHARDS[0]} holds {first}, which {INDEX} puts in {SHARDS[1]}" in message


def test_a_shard_that_holds_what_the_index_does_not_list(shards: Path) -> None:
    listed = index_of(shards)
    first = next(iter(listed))
    del listed[first]
    write_index(shards, listed)
    assert f"holds {first}, which {INDEX} puts in no file" in refusal(shards)


def test_a_shard_without_a_tensor_that_the_index_lists(shards: Path) -> None:
    write_index(shards, index_of(shards) | {"model.norm.bias": SHARDS[1]})
    with pytest.raises(ModelError, match="lists 1 tensor that no file holds, the first is") as err:
        loaded(shards)
    assert str(shards) in str(err.value) and "model.norm.bias" in str(err.value)
    listed = index_of(shards)
    weights = load_file(shards / listed["lm_head.weight"])
    del weights["lm_head.weight"]
    save_file(weights, shards / listed["lm_head.weight"], metadata=META)
    with pytest.raises(ModelError, match=f"{INDEX} lists 2 tensors that no file holds"):
        loaded(shards)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_index_keeps_the_entry_of_a_tied_weight_that_its_converter_left_out(
    tmp_path: Path, kept: str
) -> None:
    """As safetensors' convert.py writes it: it drops one of two tied weights, from the shard."""
    model = tiny_llama(seed=1, tie_word_embeddings=True, **SIZES)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WHOLE)
    (tmp_path / WHOLE).unlink()
    weights[kept] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / SHARDS[0], metadata=META)
    names = {*weights, "model.embed_tokens.weight", "lm_head.weight"}
    write_index(tmp_path, dict.fromkeys(names, SHARDS[0]))
    found, notes = loaded(tmp_path)
    assert notes == [] and same(found, model.state_dict())


@pytest.mark.parametrize("more", [{}, {"metadata": None}, {"metadata": {"total_size": "a lot"}}])
def test_what_an_index_says_besides_is_of_no_matter(
    shards: Path, whole: Path, more: dict[str, Any]
) -> None:
    """Tools other than transformers write indexes too; transformers wants an object there."""
    (shards / INDEX).write_text(json.dumps({"weight_map": index_of(shards)} | more))
    found, notes = loaded(shards)
    assert notes == [] and same(found, load_file(whole / WHOLE))


def test_shards_of_another_model(shards: Path) -> None:
    """The second shard is one of three layers, as after a mixed-up download."""
    torch.manual_seed(0)
    save_file({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}, shards / SHARDS[1])
    assert "are not of one model" in refusal(shards)


@pytest.mark.parametrize("listed", [{}, {"a": "weights.bin"}, {"a": "sub/x.safetensors"}])
def test_an_index_that_lists_no_safetensors(shards: Path, listed: dict[str, str]) -> None:
    write_index(shards, listed)
    assert f"{INDEX} cannot be read" in refusal(shards)


def test_an_index_that_answers_twice(shards: Path) -> None:
    (shards / INDEX).write_text(f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}')
    assert "given twice" in refusal(shards)


def test_shards_without_an_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    message = refusal(shards)
    assert SHARDS[0] in message and f"no {INDEX}" in message


def test_a_whole_file_by_another_name(whole: Path) -> None:
    (whole / WHOLE).rename(whole / "consolidated.safetensors")
    assert f"no {WHOLE}, only consolidated.safetensors" in refusal(whole)


def test_config_may_name_the_file(whole: Path) -> None:
    """A key of transformers: then that file is the model, and it stays inside the directory."""
    want = load_file(whole / WHOLE)
    (whole / WHOLE).rename(whole / "better.safetensors")
    config = json.loads((whole / "config.json").read_text())
    for name in ("../whole/better.safetensors", 7):
        (whole / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        assert "is no file of this directory" in refusal(whole)
    (whole / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "better.safetensors"})
    )
    found, notes = loaded(whole)
    assert same(found, want) and notes == []


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_no_model(tmp_path: Path, with_config: bool) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    if with_config:
        (folder / "config.json").write_text("{}")
    assert "merge it into its base model" in refusal(folder)


def test_a_directory_of_gguf_files(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    message = refusal(tmp_path)
    assert "has no config.json" in message and "q4.gguf, q8.gguf" in message


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the snapshot of owner/name lies in the hub's cache. There is no network."""
    from huggingface_hub import constants
    from transformers.utils import hub

    store = tmp_path / "hub" / "models--owner--name"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0" * 40)
    (store / "snapshots").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_offline_mode()
    return store / "snapshots" / ("0" * 40)


def test_a_hub_id_is_its_snapshot_checked_the_same(
    shards: Path, whole: Path, snapshot: Path
) -> None:
    """The files of the index, not the stray whole one."""
    want = load_file(whole / WHOLE)
    shutil.copytree(shards, snapshot)
    other = tiny_llama(seed=2, **SIZES).state_dict()
    save_file({k: v.contiguous() for k, v in other.items()}, snapshot / WHOLE, metadata=META)
    source = find_model("owner/name")
    assert source.kind == "hub" and load_config(source).model_type == "llama"
    notes: list[str] = []
    model = load_model(source, torch.float32, CPU, notes.append)
    assert same(model.state_dict(), want) and len(notes) == 1
    (snapshot / SHARDS[1]).unlink()
    with pytest.raises(ModelError, match="owner/name cannot be loaded"):
        load_model(source, torch.float32, CPU)


def test_a_hub_id_with_one_whole_file(whole: Path, snapshot: Path) -> None:
    """Without an index and without a generation_config, neither of which it has to have."""
    shutil.copytree(whole, snapshot)
    (snapshot / "generation_config.json").unlink()
    model = load_model(find_model("owner/name"), torch.float32, CPU)
    assert same(model.state_dict(), load_file(whole / WHOLE))
    assert model.config.name_or_path == "owner/name"
    (snapshot / WHOLE).unlink()
    with pytest.raises(ModelError, match="owner/name cannot be loaded") as caught:
        load_model(find_model("owner/name"), torch.float32, CPU)
    assert "\n" not in str(caught.value)
