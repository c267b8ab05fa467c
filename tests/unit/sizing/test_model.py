"""Shapes that are read from config.json, against transformers' own models without memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.model.wiring import probe_layers
from ds_cp.sizing import layers as layers_module
from ds_cp.sizing.families import FAMILIES
from ds_cp.sizing.model import ModelShape, read_model, shape_of
from ds_cp.startup import weights
from ds_cp.startup.weights import active_weights
from tests.helpers.shapes import ALL, config_of, model_of

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 256,
}  # fmt: skip


def read(config: Any, folder: Path) -> ModelShape:
    """The shape of what transformers writes for a config."""
    config.save_pretrained(folder)
    return read_model(str(folder))


@pytest.mark.parametrize("case", ALL)
def test_a_family_is_counted_as_its_class_is(case: str, tmp_path: Path) -> None:
    config = config_of(case)
    model = model_of(case, config)
    shape = read(config, tmp_path)
    assert shape.model_type in FAMILIES
    assert shape.total == sum(p.numel() for p in model.parameters())
    assert shape.notes == ()
    zero = getattr(config, "zero_expert_num", 0) or 0
    if not zero:  # start-up counts experts that are not there as if they cost as much
        assert abs(shape.active - active_weights(model)) <= len(shape.layers) * 4
    head = model.get_output_embeddings()
    assert shape.head_size == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize("case", ALL)
def test_layers_ask_for_what_the_server_would_see(case: str, tmp_path: Path) -> None:
    config = config_of(case)
    shape = read(config, tmp_path)
    specs = probe_layers(model_of(case, config, "cpu"))
    assert [(s.num_q_heads, s.num_kv_heads, s.head_dim, s.v_dim, s.window) for s in specs] == [
        (s.num_q_heads, s.num_kv_heads, s.head_dim, s.v_dim, s.window) for s in shape.layers
    ]


@pytest.mark.parametrize("case", ALL)
def test_tensor_parallelism_shares_what_the_plan_says(case: str, tmp_path: Path) -> None:
    """``ds_cp.model.shard`` splits what ``base_model_tp_plan`` marks, all of it by two here."""
    config = config_of(case)
    model, shape = model_of(case, config), read(config, tmp_path)
    plan = getattr(model.config, "base_model_tp_plan", None) or {}

    def style(path: str) -> str | None:
        return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))

    split, attentions = 0, 0
    for path, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear) and style(path) in ("colwise", "rowwise"):
            split += module.weight.numel()
            attentions += style(path) == "rowwise" and "attn" in path
            if style(path) == "colwise" and module.bias is not None:
                split += module.bias.numel()
    assert shape.splits == (attentions == len(shape.layers)), "else the server refuses"
    if not shape.splits:
        return
    linear = {
        f"{name}.bias" for name, m in model.base_model.named_modules() if type(m) is nn.Linear
    }
    for path, parameter in model.base_model.named_parameters():
        if path not in linear and style(path) == "colwise" and parameter.ndim == 1:
            split += parameter.numel()
    assert shape.of_rank(2) == shape.total - split // 2


# Sizes of config.json, and billions of parameters as the makers state them: in all, and active.
STATED: list[tuple[dict[str, Any], float, float]] = [
    (
        {"model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248,
         "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
         "vocab_size": 128256},
        405.9, 405.9,
    ),
    (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
        46.7, 12.9,
    ),
    (
        {"model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288,
         "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
         "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
         "vocab_size": 151936},
        235.1, 22.2,
    ),
    (
        {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
         "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
         "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
         "num_experts_per_tok": 8, "q_lora_rank": 1536, "kv_lora_rank": 512,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "first_k_dense_replace": 3, "vocab_size": 129280},
        671.0, 37.6,
    ),
    (
        {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
         "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
         "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4,
         "sliding_window": 128, "vocab_size": 201088},
        116.8, 5.7,  # they say 5.1, without the embedding's 0.58
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "total", "active"), STATED, ids=lambda v: str(v)[:28])
def test_large_models_are_what_their_makers_say(
    values: dict[str, Any], total: float, active: float
) -> None:
    shape = shape_of(values, "m", "config.json")
    assert round(shape.total / 1e9, 1) == total and round(shape.active / 1e9, 1) == active


def test_kv_of_a_token() -> None:
    """Llama 3.1 405B, bf16: 2 x 8 heads x 128 dims x 126 layers x 2 bytes; by eight ranks an
    eighth. DeepSeek-V3's latent is expanded: 128 heads x (192 + 128) dims x 61 layers."""
    llama, deepseek = (shape_of(STATED[i][0], "m", "x") for i in (0, 3))
    assert llama.kv_bytes(2, 1) == 516_096 and llama.kv_bytes(2, 8) == 64_512
    assert deepseek.kv_bytes(2, 1) == 128 * 320 * 61 * 2


def test_the_server_and_the_plan_name_experts_alike() -> None:
    assert layers_module.NUM_EXPERTS == weights.NUM_EXPERTS
    assert layers_module.ACTIVE_EXPERTS == weights.ACTIVE_EXPERTS


def test_an_unknown_family_is_read_as_llama_and_says_so() -> None:
    shape = shape_of({**LLAMA, "model_type": "novel"}, "m", "x")
    assert shape.total == shape_of(LLAMA, "m", "x").total
    assert any("novel is read as Llama's" in note for note in shape.notes)


def test_only_the_text_of_a_model_of_images_is_counted() -> None:
    shape = shape_of(
        {"model_type": "gemma3", "dtype": "float16", "text_config": {**LLAMA}}, "m", "x"
    )
    assert shape.total == shape_of(LLAMA, "m", "x").total and shape.dtype == "fp16"
    assert "only the text part" in shape.notes[0]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": None}, "does not say hidden_size or n_embd"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number from 1 to"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": "64"}, "hidden_size is 64;"),
        ({"hidden_size": 10**40}, "hidden_size is 1000000"),
        ({"hidden_size": 66}, "66 does not divide by 4 heads"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 KV heads"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is no; it must be true or false"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"layer_types": ["full_attention"]}, "layer_types lists 1 layers of 2"),
        ({"layer_types": 5}, "layer_types must be a list"),
        ({"layer_types": ["sliding_attention"] * 2}, "does not say sliding_window"),
        ({"vocab_size": -5}, "vocab_size is -5"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelError, match=re.escape(part)) as caught:
        shape_of({**LLAMA, **changes}, "m", "config.json")
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_what_the_server_refuses_is_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=part):
        shape_of({**LLAMA, **changes}, "m", "x")


def test_files_that_are_no_config(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(ModelError) as caught:
            read_model(name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file = tmp_path / "config.json"
    assert "no directory or config.json" in refused("none")
    assert "is empty" in refused("")
    assert "does not exist" in refused(str(tmp_path))
    assert "no directory" in refused("a\0b")
    for content, part in (
        (b"", "not valid JSON"), (b"[1]", "holds no JSON object"), (b"\xff{}", "not UTF-8"),
        (b'{"a":1,"a":2}', "given twice"), (b"[" * 100_000, "nested too deeply"),
        (b" " * ((4 << 20) + 1), "more than 4194304 bytes"),
    ):  # fmt: skip
        file.write_bytes(content)
        assert part in refused(str(file))
    file.write_text(json.dumps(LLAMA))
    assert read_model(str(tmp_path)) == read_model(str(file))
    file.unlink()
    file.mkdir()
    assert "is not a file" in refused(str(tmp_path))
