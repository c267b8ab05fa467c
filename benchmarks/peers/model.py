"""The 90M Llama of the engine rows: random weights of a fixed seed, as safetensors and as GGUF."""

from __future__ import annotations

from pathlib import Path

import torch

FOLDER = Path(".cache/llama-90m")
LONGEST = 32768
# 8 layers of 1024, 16 query and 4 KV heads of 64: 90M parameters in linear layers of the decoder.
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": LONGEST + 1024,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEED = 90


def make_model(folder: Path = FOLDER) -> tuple[Path, Path]:
    """The folder of the checkpoint and its GGUF file; written where they are missing."""
    gguf = folder / "model.gguf"
    if not gguf.exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
        model.save_pretrained(folder)
        _write_gguf(model, gguf)
    return folder.absolute(), gguf.absolute()


def _write_gguf(model: torch.nn.Module, file: Path) -> None:
    import gguf

    heads, kv_heads = int(SHAPE["num_attention_heads"]), int(SHAPE["num_key_value_heads"])
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name("random 90M Llama")
    writer.add_context_length(int(SHAPE["max_position_embeddings"]))
    writer.add_embedding_length(int(SHAPE["hidden_size"]))
    writer.add_block_count(int(SHAPE["num_hidden_layers"]))
    writer.add_feed_forward_length(int(SHAPE["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(int(SHAPE["head_dim"]))
    writer.add_value_length(int(SHAPE["head_dim"]))
    writer.add_rope_dimension_count(int(SHAPE["head_dim"]))
    writer.add_rope_freq_base(float(SHAPE["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(SHAPE["rms_norm_eps"]))
    writer.add_vocab_size(int(SHAPE["vocab_size"]))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")  # prompts and answers are token ids
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(SHAPE["num_hidden_layers"]))
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            tensor = _rotate_in_pairs(tensor, heads)
        elif name.endswith("k_proj.weight"):
            tensor = _rotate_in_pairs(tensor, kv_heads)
        short = names.get_name(name, try_suffixes=(".weight",))
        assert short is not None, name
        if tensor.ndim == 1:
            writer.add_tensor(short, tensor.float().numpy())
            continue
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(short, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(file)


def _rotate_in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers rotates the two halves of a head, llama.cpp neighbours: rows change places."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)
