"""GGUF files: all of the file reaches the model, or the file is refused with the numbers."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ds_cp.errors import ModelError
from ds_cp.model.gguf import read_gguf
from ds_cp.model.loading import load_model
from ds_cp.model.source import find_model
from tests.helpers.engines import tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a rotated projection in llama.cpp's order: pairs side by side, not in halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write(
    path: Path, model: Any, extra: dict[str, np.ndarray[Any, Any]] | None = None, tied: bool = False
) -> None:
    """``model`` as an fp32 GGUF file, with more tensors if asked."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_eos_token_id(5)
    for name, value in model.state_dict().items():
        where, kind = name.rsplit(".", 1)
        array = value.numpy()
        if where in OUTSIDE:
            if where != "lm_head" or not tied:
                writer.add_tensor(f"{OUTSIDE[where]}.{kind}", array)
            continue
        _, _, layer, part = where.split(".", 3)
        if part.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_" in part else config.num_key_value_heads
            array = permuted(array, heads)
        writer.add_tensor(f"blk.{layer}.{BLOCK[part]}.{kind}", array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: Path) -> Any:
    return load_model(find_model(str(path)), torch.float32, torch.device("cpu"))


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_is_the_model_that_was_written(tmp_path: Path, tied: bool) -> None:
    file = tmp_path / "tiny.gguf"
    model = tiny_llama(**SIZES, tie_word_embeddings=tied)
    write(file, model, tied=tied)
    found = read_gguf(file)
    assert len(found) == 20 if tied else 21
    assert sum(t.elements for t in found.values()) == sum(p.numel() for p in model.parameters())
    raw = file.read_bytes()
    for name, value in (("output_norm.weight", model.model.norm.weight),):
        start = found[name].start
        stored = np.frombuffer(raw[start : start + 4 * found[name].elements], dtype=np.float32)
        assert np.array_equal(stored, value.detach().numpy())
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(load(file)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_rotary_factors_that_transformers_does_not_read(tmp_path: Path) -> None:
    """As in files of Llama 3.1 and later; factors of one change nothing."""
    plain, scaled = tmp_path / "plain.gguf", tmp_path / "scaled.gguf"
    model = tiny_llama(**SIZES)
    write(plain, model, {"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(load(plain)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    write(scaled, model, {"rope_freqs.weight": np.array([1] * 6 + [4, 8], dtype=np.float32)})
    assert "scales its rotary frequencies by rope_freqs.weight" in refusal(scaled)


def test_tensors_that_transformers_has_no_name_for(tmp_path: Path) -> None:
    file = tmp_path / "more.gguf"
    model = tiny_llama(**SIZES)
    write(file, model, {"blk.0.attn_gate.weight": np.ones((64, 64), dtype=np.float32)})
    read = sum(p.numel() for p in model.parameters())
    assert f"stores {read + 4096} weights, of which transformers reads {read}" in refusal(file)


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    file = tmp_path / "nan.gguf"
    model = tiny_llama(**SIZES)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    write(file, model)
    assert "model.norm.weight holds 1 NaN or infinite value" in refusal(file)


def test_a_part_of_a_split_file(tmp_path: Path) -> None:
    file = tmp_path / "m-00001-of-00003.gguf"
    write(file, tiny_llama(**SIZES))
    assert "is part 1 of 3 of a split GGUF file" in refusal(file)


@pytest.mark.parametrize("left", [0.5, -1])
def test_a_truncated_file(tmp_path: Path, left: float) -> None:
    file = tmp_path / "cut.gguf"
    write(file, tiny_llama(**SIZES))
    raw = file.read_bytes().rstrip(b"\0")
    file.write_bytes(raw[: int(len(raw) * left)] if left > 0 else raw[:left])
    assert "is truncated" in refusal(file) and str(file.stat().st_size) in refusal(file)


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        struct.pack("<IQQ", 3, 2**60, 0),
        struct.pack("<IQQ", 3, 0, 2**60),
        struct.pack("<IQQQ", 3, 0, 1, 2**63) + b"key",
        struct.pack("<IQQQ", 3, 0, 1, 3) + b"key" + struct.pack("<I", 77),
        struct.pack("<IQQQ", 3, 0, 1, 3) + b"key" + struct.pack("<IIQ", 9, 8, 2**62),
        struct.pack("<IQQQ", 3, 0, 1, 3) + b"key" + struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<IQQQ", 3, 1, 0, 3) + b"key" + struct.pack("<I", 2**32 - 1),
        struct.pack("<IQQQ", 3, 1, 0, 3) + b"\xff\xff\xff" + struct.pack("<I", 1),
    ],
)
def test_a_damaged_header(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF" + tail)
    assert "damaged GGUF header" in refusal(file)


def test_the_package_that_gguf_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, tiny_llama(**SIZES))
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(ModelError, match="needs the packages gguf and accelerate"):
        read_gguf(file)
