"""What config.json, generation_config.json and tokenizer_config.json say can be anything: a start
works, or ends in one line that names the model and the key. Generated from the files of a model, so
that a new key of transformers is covered."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.model import loading
from ds_cp.model.end_tokens import describe_tokenizer, model_end_tokens
from ds_cp.model.faults import model_at_fault
from ds_cp.model.loading import load_config, load_model, load_tokenizer
from ds_cp.model.source import find_model
from ds_cp.model.steering import STEERING, without_steering
from ds_cp.model.values import check_values
from ds_cp.model.wiring import check_positions, probe
from tests.helpers.engines import tiny_llama
from tests.helpers.tiny import make_tiny_model

CPU = torch.device("cpu")
MISSING = "missing"
ODD: tuple[Any, ...] = (0, -1, None, "x", [], {}, 1e30, True, 10**9, 2**70, math.nan, MISSING)
# Keys of tiny models' files whose value nothing reads, or that never reach transformers: they are
# odd together.
UNREAD = {
    "architectures", "transformers_version", "use_cache", "_from_model_config", "backend",
    "output_attentions", "output_hidden_states", "is_local", "local_files_only", "num_labels",
    "id2label", "pretraining_tp",
}  # fmt: skip
# How a value is refused that could be one, but not with these weights.
OTHER_WEIGHTS = (" of its weights, the first", "but config.json makes it", "that no file holds")

CONFIG = (
    "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim",
    "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "vocab_size", "architectures",
    "transformers_version", "use_cache",
)  # fmt: skip
ADDED = (
    "num_labels", "id2label", "text_config", "layer_types", "sliding_window", "per_layer_config",
    "quantization_config", "torch_dtype", "is_encoder_decoder", "output_attentions", "rope_scaling",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("odd") / "model")
    config = hf.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start(folder: Path, tokenizer: bool) -> None:
    """What a rank reads of the model until it is wired, or what rank 0 reads of the tokenizer."""
    source = find_model(str(folder))
    if tokenizer:
        describe_tokenizer(load_tokenizer(source))
        return
    load_config(source)
    decoder = load_model(source, torch.float32, CPU)
    with model_at_fault(str(folder), decoder.config.to_dict(), "does not run"):
        probe(decoder)
        check_positions(decoder, decoder.config.get_text_config().max_position_embeddings)
    model_end_tokens(decoder)


def check(folder: Path, file: str, keys: set[str], odd: Any, tokenizer: bool = False) -> None:
    """Start with ``odd`` as the value of all ``keys``."""
    path = folder / file
    before = path.read_text()
    found = {key: value for key, value in json.loads(before).items() if key not in keys}
    if odd is not MISSING:
        found |= dict.fromkeys(keys, odd)
    path.write_text(json.dumps(found))
    try:
        start(folder, tokenizer)
    except ModelError as err:
        message = str(err)
        assert "\n" not in message and len(message) < 1000, message
        assert str(folder) in message, message
        other = any(words in message for words in OTHER_WEIGHTS)
        assert any(key in message for key in keys) or other or odd is MISSING, message
    finally:
        path.write_text(before)


def one_by_one(keys: Iterable[str]) -> list[set[str]]:
    """The keys to be odd at once: those that something reads alone."""
    keys = set(keys)
    return [*({key} for key in sorted(keys - UNREAD)), *([keys & UNREAD] if keys & UNREAD else [])]


def test_the_keys_are_those_of_the_file(model: Path) -> None:
    assert set(json.loads((model / "config.json").read_text())) == set(CONFIG)


@pytest.mark.parametrize(
    "keys", one_by_one(CONFIG + ADDED), ids=lambda keys: " ".join(sorted(keys))
)
def test_config(model: Path, keys: set[str]) -> None:
    for odd in ODD:
        check(model, "config.json", keys, odd)


def test_generation_config(model: Path) -> None:
    stated = json.loads((model / "generation_config.json").read_text())
    for keys in one_by_one({*stated, "bos_token_id"}):
        for odd in ODD:
            check(model, "generation_config.json", keys, odd)


def test_tokenizer_config(model: Path) -> None:
    more = ("auto_map", "extra_special_tokens", "chat_template")
    stated = json.loads((model / "tokenizer_config.json").read_text())
    for keys in one_by_one({*stated, *more}):
        for odd in ODD:
            check(model, "tokenizer_config.json", keys, odd, tokenizer=True)


ROPE = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32},
    "longrope": {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
                 "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    "llama3": {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_parameters(kind: str) -> None:
    good = {"rope_type": kind, **ROPE[kind]}
    check_values("M", {"rope_parameters": good})
    check_values("M", {"rope_parameters": {"full_attention": good}})
    for key in ROPE[kind]:
        for odd in (0, -1, "x", True, 2**70, math.nan, {"a": 1}):
            if odd in (0, -1) and key.startswith(("short", "long", "low", "high")):
                continue
            for found in (good | {key: odd}, {"full_attention": good | {key: odd}}):
                with pytest.raises(ModelError, match=rf"model M: config\.json's rope_.*\.{key} is"):
                    check_values("M", {"rope_parameters": found})


@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3"])
def test_a_rotary_parameter_that_is_left_out(model: Path, kind: str) -> None:
    for key in ROPE[kind]:
        odd = {k: v for k, v in {"rope_type": kind, **ROPE[kind]}.items() if k != key}
        check(model, "config.json", {"rope_parameters"}, odd)
    for odd in ([], [1.0] * 3):
        rope = {"rope_type": "longrope", **ROPE["longrope"], "short_factor": odd}
        check(model, "config.json", {"rope_parameters"}, rope)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10_000), ("num_hidden_layers", 13), ("hidden_size", 2**20),
     ("vocab_size", 2**26), ("intermediate_size", 2**26), ("head_dim", 60_000),
     ("num_experts", 10**6)],
)  # fmt: skip
def test_a_size_that_the_files_cannot_have_takes_no_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: int
) -> None:
    """It is refused by name before transformers makes a tensor of it."""
    config = json.loads((model / "config.json").read_text()) | {key: value}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    built: list[Any] = []
    monkeypatch.setattr(loading, "_build", lambda *a: built.append(a))
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(config))
    try:
        with pytest.raises(ModelError, match=key):
            load_model(find_model(str(model)), torch.float32, CPU)
    finally:
        (model / "config.json").write_text(text)
    assert built == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


def test_a_size_whose_key_is_not_known_is_found_by_the_shape(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor names the keys whose values are its sizes."""
    monkeypatch.setattr(loading, "check_sizes", lambda *_: None)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(text) | {"vocab_size": 2**26}))
    try:
        with pytest.raises(ModelError, match=r"is \[67108864, 16\] by vocab_size, hidden_size"):
            load_model(find_model(str(model)), torch.float32, CPU)
    finally:
        (model / "config.json").write_text(text)


@pytest.fixture(scope="module")
def families() -> dict[str, dict[str, Any]]:
    """config.json of every decoder that transformers knows, as its class makes it, by model type;
    and of the decoders within larger models."""
    found: dict[str, dict[str, Any]] = {}
    for name in hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            whole = hf.CONFIG_MAPPING[name]()
            configs = whole, whole.get_text_config()
        except Exception:  # a class without defaults, or one whose package is not installed
            continue
        for config in configs:
            stated = json.loads(config.to_json_string(use_diff=False))
            found[config.model_type] = stated
    return found


def test_every_family_passes_with_its_defaults(families: dict[str, dict[str, Any]]) -> None:
    """What is checked here is true of every decoder that transformers knows."""
    assert len(families) > 150
    for name, stated in families.items():
        check_values(name, stated)


def changed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: changed(inner) for key, inner in value.items()}
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else value


def lost(stated: dict[str, Any], kept: dict[str, Any]) -> set[str]:
    """Keys of plain values that are not as they were stated, at any depth."""
    found = set()
    for key, value in stated.items():
        if isinstance(value, dict):
            found |= lost(value, kept[key]) if key in kept else set()
        elif not isinstance(value, list) and kept.get(key, MISSING) != value:
            found.add(key)
    return found


def test_what_a_config_states_is_kept(families: dict[str, dict[str, Any]]) -> None:
    """Also where the default is an attribute of the class alone."""
    for name, stated in families.items():
        stated = changed(stated)
        assert lost(stated, without_steering(stated)[0]) <= STEERING, name
    stated = {"model_type": "nomic_bert", "tie_word_embeddings": False, "to_dict": 1}
    assert without_steering(stated)[0].keys() == {"model_type", "tie_word_embeddings"}


def test_a_padding_token_beyond_the_vocabulary_is_served(tmp_path: Path) -> None:
    """Most families do not tell their embeddings of it; fine-tunes add one."""
    config = hf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    start(tmp_path, tokenizer=False)


def test_keys_that_a_family_does_not_read_may_say_anything(tmp_path: Path) -> None:
    config = hf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    odd = {"num_attention_heads": 2, "num_key_value_heads": 3, "intermediate_size": 512,
           "first_k_dense_replace": 99, "pad_token_id": -100, "torch_dtype": "float"}  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    start(tmp_path, tokenizer=False)


def divide(heads: Any) -> float:
    return 1 / heads.n_groups


def test_a_fault_names_the_key_that_the_failing_line_reads() -> None:
    class Config:
        n_groups = 0

    config = {"n_groups": 0, "hidden_size": 4, "text_config": {"n_groups": 0}}
    with pytest.raises(UnsupportedModelError) as caught:
        with model_at_fault("M", config, "does not run", UnsupportedModelError):
            divide(Config())
    message = str(caught.value)
    assert message.startswith("model M does not run with config.json's n_groups = 0 (ZeroDivision")
    with pytest.raises(ModelError, match="with config.json's hidden_size = 4"):
        with model_at_fault("M", config, "does not run"):
            raise AssertionError("hidden_size\nis odd")


@pytest.mark.parametrize(
    "err", [MemoryError(), RuntimeError("can't allocate memory: 9"), UnsupportedModelError("x")]
)
def test_lack_of_memory_and_our_own_errors_are_no_fault_of_the_model(err: Exception) -> None:
    with pytest.raises(type(err)) as caught, model_at_fault("M", {}, "does not run"):
        raise err
    assert caught.value is err


def test_a_json_file_of_a_model_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        load_model(find_model(str(tmp_path)), torch.float32, CPU)
    with (tmp_path / "config.json").open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match="has 1099511627776 bytes, more than"):
        find_model(str(tmp_path))
