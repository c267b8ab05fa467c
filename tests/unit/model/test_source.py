"""Where a model comes from: each thing that can be wrong is one line that says which, and what
would do."""

from __future__ import annotations

import json
import struct
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.model.loading import load_config, load_model, load_tokenizer
from ds_cp.model.source import ModelSource, find_model
from tests.helpers.engines import tiny_llama
from tests.helpers.tiny import make_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model directory that is fine."""
    path = tmp_path / "model"
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(path)
    return path


def refusal(model: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(model))
    message = str(caught.value)
    assert "\n" not in message and str(model) in message
    assert caught.value.exit_code == 2
    return message


def test_a_good_directory(folder: Path) -> None:
    source = find_model(str(folder))
    assert source == ModelSource("directory", str(folder)) and source.name == "model"
    assert load_config(source).model_type == "llama"
    model = load_model(source, torch.float32, CPU)
    want = tiny_llama(hidden_size=16, intermediate_size=16).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_a_good_directory_in_two_shards(tmp_path: Path) -> None:
    path = tmp_path / "two"
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(path, max_shard_size="10KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    assert find_model(str(path)).kind == "directory"
    missing = sorted(path.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ModelError, match=f"{missing.name} is missing"):
        find_model(str(path))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {"a": null}}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": 7}}',
        "\x00",
    ],
)
def test_damaged_index(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert "index.json cannot be read" in refusal(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hosts", "..", "", "weights.bin"])
def test_an_index_names_files_of_its_directory(folder: Path, name: str) -> None:
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refusal(folder)


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "\x00\x01", '{"a": }'])
def test_config_that_is_no_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json cannot be read" in refusal(folder)


def test_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json cannot be read" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_only_pickle_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert "only pickle weights" in message and name in message and "safetensors" in message


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors file" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 0.5, -1])
def test_truncated_safetensors(folder: Path, keep: float) -> None:
    """Cut before, within and after the header, in the middle, and by one byte."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = int(len(whole) * keep) if 0 < keep < 1 else int(keep) % len(whole)
    file.write_bytes(whole[:size])
    message = refusal(folder)
    assert "truncated" in message and str(size) in message and "model.safetensors" in message


@pytest.mark.parametrize(
    "header",
    [
        b"{]",
        b"[]",
        b'{"a": 3}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": "xy"}}',
        b'{"a": {"data_offsets": [0]}}',
        b"\xff" * 9,
    ],
)
def test_damaged_header(folder: Path, header: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    assert "damaged header" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1])
def test_header_length_that_cannot_be(folder: Path, length: int) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + bytes(500))
    assert "not safetensors" in refusal(folder)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_weights_that_this_user_may_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = folder / "model.safetensors"
    real = Path.open

    def refused(self: Path, *mode: Any, **more: Any) -> Any:
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *mode, **more)

    monkeypatch.setattr(Path, "open", refused)
    message = refusal(folder if kind == "directory" else file)
    assert message.endswith(f"cannot be read: Permission denied ({file})")


def test_weights_of_another_shape(folder: Path) -> None:
    """The header is sound, but the config asks for something else."""
    state = tiny_llama(hidden_size=32, intermediate_size=16).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ModelError) as caught:
        load_model(find_model(str(folder)), torch.float32, CPU)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_gguf(tmp_path: Path) -> None:
    good, bad, empty = (tmp_path / name for name in ("good.gguf", "bad.gguf", "empty.gguf"))
    good.write_bytes(b"GGUF" + bytes(20))
    bad.write_bytes(b"GGML" + bytes(20))
    empty.write_bytes(b"")
    assert find_model(str(good)) == ModelSource("gguf", str(good))
    assert find_model(str(good)).name == "good"
    assert "not a GGUF file" in refusal(bad)
    assert "not a GGUF file" in refusal(empty)
    assert "does not exist" in refusal(tmp_path / "none.gguf")
    with pytest.raises(ModelError) as caught:  # the right magic, and nothing behind it
        load_config(ModelSource("gguf", str(good)))
    assert "\n" not in str(caught.value) and str(good) in str(caught.value)


def test_weight_files_alone_are_no_model(folder: Path) -> None:
    assert "not a GGUF file" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["gpt2", "owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c"]
)
def test_hub_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(name) == ModelSource("hub", name)
    assert find_model(name).name == name


@pytest.mark.parametrize(
    "name",
    ["./gpt2", "../x/y", "/models/llama", "~/llama", "a/b/c", "x.gguf", "dir/x.gguf", "w.bin",
     "m.safetensors", "has space", "owner/", "/", "-x", "a/b\n", "https://host/x", "ümlaut?"],
)  # fmt: skip
def test_paths_that_are_not_there_are_no_hub_ids(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "/":
        assert "has no config.json" in refusal(name)
        return
    with pytest.raises(ModelError, match="does not exist"):
        find_model(name)


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/model") == ModelSource("directory", str(folder))


def test_a_directory_shadows_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert find_model("model").kind == "directory"


def test_tokenizer_missing(folder: Path) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_tokenizer(find_model(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "null"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "9.0", "added_tokens": [], "model": {"type": "Newer"}}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
)
def test_a_tokenizer_that_does_not_load(tmp_path: Path, file: str, text: str) -> None:
    """The model is at fault, not ds_cp, whatever the packages raise."""
    path = make_tiny_model(tmp_path / "model")
    (path / file).write_text(text)
    with pytest.raises(ModelError, match="has no usable tokenizer: .") as caught:
        load_tokenizer(find_model(str(path)))
    assert "\n" not in str(caught.value)


# --- architectures that are refused by their config


def save_config(folder: Path, config: Any) -> ModelSource:
    config.save_pretrained(folder)
    return ModelSource("directory", str(folder))


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder"):
        load_config(save_config(tmp_path, config))


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(UnsupportedModelError, match="unheard_of") as caught:
        load_config(ModelSource("directory", str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), RuntimeError),
        (RuntimeError("size mismatch"), UnsupportedModelError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (None, None),
    ],
)
def test_a_load_leaves_no_links_behind_and_names_its_cause(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    raised: BaseException | None, seen: type[BaseException] | None,
) -> None:  # fmt: skip
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(links))
    real = hf.AutoModelForCausalLM.from_pretrained
    views: list[int] = []

    def from_pretrained(where: str, **options: Any) -> Any:
        views.append(len(list(links.iterdir())))
        if raised is not None:
            raise raised
        return real(where, **options)

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    work = partial(load_model, find_model(str(folder)), torch.float32, CPU)
    if seen is None:
        work()
    else:
        with pytest.raises(seen) as caught:
            work()
        assert type(caught.value) is seen, "memory that is short is no unknown architecture"
    assert views == [1] and list(links.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"layer_types": ["a"]}, "layer_types"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"dtype": "float7"}, "float7"),
        ({"quantization_config": "x"}, ""),
        ({"quantization_config": {"quant_method": ["fp8"]}}, ""),
    ],
)
def test_a_config_with_a_value_that_cannot_be(
    folder: Path, change: dict[str, Any], named: str
) -> None:
    """The model is at fault, not ds_cp, whatever transformers raises."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    source = find_model(str(folder))
    with pytest.raises(ModelError) as caught:
        load_config(source)
        load_model(source, torch.float32, CPU)
    message = str(caught.value)
    assert named in message and str(folder) in message and "\n" not in message


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "evil",
         "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    ))  # fmt: skip
    with pytest.raises(ModelError):
        load_config(ModelSource("directory", str(tmp_path)))
    assert not mark.exists()
