"""Every stored tensor reaches the model, or the model is refused by that tensor's name.

The reference for what is served is transformers on the unquantized weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from ds_cp.errors import ModelError
from ds_cp.model.loading import load_model
from ds_cp.model.source import find_model
from tests.helpers.engines import tiny_llama

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"
PLAIN = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_llama(**PLAIN).save_pretrained(path)
    return path


def rewrite(folder: Path, change: Callable[[Weights], Weights | None], **config: Any) -> Weights:
    """Change the stored weights and the config's keys; returns the weights as they were."""
    file = folder / "model.safetensors"
    before = load_file(file)
    after = change(dict(before))
    save_file(before if after is None else after, file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return before


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return load_model(find_model(str(folder)), dtype, CPU, notes.append), notes


def refusal(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, dtype)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and caught.value.exit_code == 2
    return message


def with_scales(weights: Weights) -> Weights:
    """FP8 as ModelOpt writes it: scales of weights and inputs in tensors of their own."""
    out: Weights = {}
    for name, value in weights.items():
        if name.endswith("proj.weight"):
            scale = value.abs().max() / 448
            out[name] = (value / scale).to(torch.float8_e4m3fn)
            out[f"{name}_scale"] = scale
            out[name.replace(".weight", ".input_scale")] = torch.tensor(1.0)
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("method", ["modelopt", "unheard_of", None])
def test_a_quantization_that_transformers_does_not_read(folder: Path, method: str | None) -> None:
    rewrite(folder, with_scales, quantization_config={"quant_method": method, "quant_algo": "FP8"})
    message = refusal(folder)
    assert f"quantization_config names the method {method}" in message


def test_a_compression_config_is_a_quantization_too(folder: Path) -> None:
    rewrite(folder, lambda w: None, compression_config={"format": "pack-quantized"})
    assert "compression_config names the method compressed-tensors" in refusal(folder)


def test_scales_without_a_word_in_the_config(folder: Path) -> None:
    rewrite(folder, with_scales)
    message = refusal(folder)
    assert "stores 14 tensors in F8_E4M3" in message and "model.layers.0." in message


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
    ],
)
def test_low_bit_values_in_a_plain_layer(folder: Path, dtype: torch.dtype, named: str) -> None:
    def change(weights: Weights) -> None:
        weights[f"{Q}.weight"] = (weights[f"{Q}.weight"] * 100).to(dtype)

    rewrite(folder, lambda w: change(w) or w)
    message = refusal(folder)
    assert f"stores 1 tensor in {named}, the first is {Q}.weight" in message


def test_packed_weights(folder: Path) -> None:
    """As AWQ and GPTQ store them, without the config that says so."""

    def change(weights: Weights) -> Weights:
        del weights[f"{Q}.weight"]
        packed = [torch.zeros(4, 32, dtype=torch.int32) for _ in range(2)]
        return weights | {f"{Q}.qweight": packed[0], f"{Q}.qzeros": packed[1]}

    rewrite(folder, change)
    message = refusal(folder)
    assert "in I32" in message and f"{Q}.qweight, {Q}.qzeros" in message


def test_a_quantization_that_transformers_reads_is_served_as_the_weights(folder: Path) -> None:
    """Block-wise FP8 of the kind that transformers dequantizes: within FP8's rounding of the
    unquantized weights, which it would miss by the scales' factors."""
    block = 16

    def change(weights: Weights) -> Weights:
        out: Weights = {}
        for name, value in weights.items():
            if not name.endswith("proj.weight"):
                out[name] = value
                continue
            rows, columns = (n // block for n in value.shape)
            tiles = value.reshape(rows, block, columns, block)
            scale = tiles.abs().amax(dim=(1, 3)) / 448
            out[name] = (tiles / scale[:, None, :, None]).reshape(value.shape).to(
                torch.float8_e4m3fn
            )  # fmt: skip
            out[f"{name}_scale_inv"] = scale
            out[name.replace(".weight", ".input_scale")] = torch.tensor(1.0)
        return out

    want = rewrite(folder, change, quantization_config={
        "quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic",
    })  # fmt: skip
    model, notes = load(folder)
    assert notes == [
        "of the checkpoint's tensors 14 are not used: ranges of 8-bit activations (14)"
    ]
    found = model.state_dict()
    for name in (f"{Q}.weight", "model.layers.1.mlp.down_proj.weight"):
        worst = (found[name].float() - want[name]).abs().max() / want[name].abs().max()
        assert found[name].is_floating_point() and worst < 2**-3, f"{name}: {worst}"


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.weight_scale",
        f"{Q}.input_scale",
        f"{Q}.bias",
        f"{Q}.lora_A.weight",
        f"{Q}_norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.vision_gate.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_norm.weight",
        "lm_head.weight_scale",
        "lm_head.bias",
        "score.weight",
    ],
)
def test_a_tensor_of_the_decoder_that_nothing_reads(folder: Path, name: str) -> None:
    rewrite(folder, lambda w: w | {name: torch.ones(3)})
    assert f"holds 1 tensor that LlamaForCausalLM does not read, the first is {name}" in refusal(
        folder
    )


def test_layers_beyond_what_the_config_counts(folder: Path) -> None:
    rewrite(folder, lambda w: None, num_hidden_layers=1)
    message = refusal(folder)
    assert "holds 9 tensors" in message and "model.layers.1.input_layernorm.weight" in message


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["vision_tower.encoder.layers.0.q_proj.weight", "vision_tower.post_norm.bias"],
         "2 are not used: vision_tower.* (2)"),
        (["model.visual.patch_embed.weight"], "model.visual.* (1)"),
        (["multi_modal_projector.linear_1.weight", "model.image_newline"],
         "model.image_newline (1), multi_modal_projector.* (1)"),
        (["mtp.fc.weight"], "mtp.* (1)"),
        (["v_head.summary.bias"], "v_head.* (1)"),
        (["model.layers.0.self_attn.rotary_emb.inv_freq",
          "model.layers.1.self_attn.rotary_emb.inv_freq"], "rotary_emb.inv_freq (computed) (2)"),
        (["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_proj.output_scale"],
         "ranges of an 8-bit KV cache (2)"),
    ],
)  # fmt: skip
def test_what_may_stay_unread_is_said(folder: Path, names: list[str], said: str) -> None:
    want = rewrite(folder, lambda w: w | {name: torch.ones(3) for name in names})
    model, [note] = load(folder)
    assert said in note and f"of the checkpoint's tensors {len(names)} are not used" in note
    assert all(torch.equal(model.state_dict()[name], value) for name, value in want.items())


def test_next_token_prediction_layers_are_said_where_the_config_counts_them(folder: Path) -> None:
    extra = {f"model.layers.2.{n}": torch.ones(3) for n in ("enorm.weight", "eh_proj.weight")}
    rewrite(folder, lambda w: w | extra)
    assert "model.layers.2.eh_proj.weight" in refusal(folder)
    rewrite(folder, lambda w: None, num_nextn_predict_layers=1)
    _, [note] = load(folder)
    assert "model.layers.2.* (next-token prediction) (2)" in note


def test_what_a_class_leaves_out_of_its_report_is_said(tmp_path: Path) -> None:
    config = hf.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    hf.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    masks = {f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)
             for i in (0, 1)}  # fmt: skip
    rewrite(tmp_path, lambda w: w | masks)
    _, [note] = load(tmp_path)
    assert note == (
        "of the checkpoint's tensors 2 are not used: gpt_neox.layers.*.attention.bias (2)"
    )


def test_a_file_without_the_prefix_of_its_model_is_read_whole(tmp_path: Path) -> None:
    """As the hub's gpt2 is. The class leaves out "attn.bias", which "c_attn.bias" matches too."""
    config = hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in (0, 1)}
    rewrite(tmp_path, lambda w: {n.removeprefix("transformer."): v for n, v in w.items()} | masks)
    found, [note] = load(tmp_path)
    assert note == "of the checkpoint's tensors 2 are not used: h.*.attn.bias (2)"
    assert all(torch.equal(found.state_dict()[n], v) for n, v in model.state_dict().items())


def test_a_missing_weight_is_named(folder: Path) -> None:
    def change(weights: Weights) -> Weights:
        del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
        return weights

    rewrite(folder, change)
    message = refusal(folder)
    assert "lacks 2 of its weights, the first are " in message
    assert "model.layers.1.mlp.up_proj.weight, model.norm.weight" in message


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_is_no_missing_weight(tmp_path: Path, kept: str) -> None:
    model = tiny_llama(**PLAIN, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    want = model.get_input_embeddings().weight

    def change(weights: Weights) -> Weights:
        weights[kept] = weights.pop("model.embed_tokens.weight")
        return weights

    rewrite(tmp_path, change)
    found, notes = load(tmp_path)
    assert notes == [] and torch.equal(found.lm_head.weight, want)
    assert torch.equal(found.model.embed_tokens.weight, want)


def test_a_head_that_differs_from_what_the_config_ties_it_to_is_said(tmp_path: Path) -> None:
    tiny_llama(**PLAIN, tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda w: w | {"lm_head.weight": torch.ones(128, 32)})
    found, [note] = load(tmp_path)
    assert "ties the head" in note and found.lm_head.weight.eq(1).all()
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.lm_head.weight, found.lm_head.weight), "as transformers does"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    def change(weights: Weights) -> Weights:
        weights["model.layers.1.self_attn.o_proj.weight"][3, 5] = value
        return {name: w.to(dtype) for name, w in weights.items()}

    rewrite(folder, change)
    message = refusal(folder, dtype)
    assert (
        "model.layers.1.self_attn.o_proj.weight (model.safetensors) holds 1 NaN or infinite value"
        in message
    )


def test_opposite_infinities_and_sums_beyond_the_dtype(folder: Path) -> None:
    """A sum that is not finite is a reason to look, not a verdict."""

    def both(weights: Weights) -> Weights:
        weights["model.norm.weight"][:2] = torch.tensor([float("inf"), float("-inf")])
        return weights

    before = rewrite(folder, lambda w: w | {"model.norm.weight": torch.full((32,), 60000.0)})
    model, notes = load(folder, torch.float16)
    assert model.model.norm.weight.sum().isinf() and notes == []
    rewrite(folder, lambda w: both(before))
    assert "model.norm.weight (model.safetensors) holds 2 NaN or infinite values" in refusal(folder)


def test_a_weight_too_large_for_the_dtype_it_is_served_in(folder: Path) -> None:
    rewrite(folder, lambda w: w | {"model.norm.weight": torch.full((32,), 1e6)})
    load(folder)
    message = refusal(folder, torch.float16)
    assert "holds 32 NaN or infinite values" in message and "set dtype to fp32" in message


def test_a_vocabulary_that_the_weights_do_not_have(folder: Path) -> None:
    rewrite(folder, lambda w: None, vocab_size=100)
    message = refusal(folder)
    assert "model.embed_tokens.weight has shape [128, 32] in model.safetensors" in message or (
        "lm_head.weight has shape [128, 32] in model.safetensors" in message
    )
    assert "makes it [100, 32] (2 such)" in message
    assert "vocab_size is 100, the weights have 128 tokens" in message


def test_a_misshaped_weight(folder: Path) -> None:
    rewrite(folder, lambda w: w | {f"{Q}.weight": torch.ones(16, 32)})
    message = refusal(folder)
    assert f"{Q}.weight has shape [16, 32] in model.safetensors" in message
    assert "makes it [32, 32] (1 such)" in message and "vocab_size" not in message


def test_experts_that_are_merged_on_load_are_consumed(tmp_path: Path) -> None:
    """Names that transformers renames and stacks are neither missing nor unread."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    made = hf.MixtralForCausalLM(config).eval()
    made.save_pretrained(tmp_path)
    assert any("experts.3" in name for name in load_file(tmp_path / "model.safetensors"))
    model, notes = load(tmp_path)
    assert notes == []
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, made(ids).logits)
