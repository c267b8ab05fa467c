"""Values of config.json that a decoder needs, checked before anything is built from them.

A config class checks types. Counts and sizes are checked here, for a layer list of a thousand
million entries is made before it can be found wrong. What is not known here is refused when it
fails (``faults``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ds_cp.errors import ModelError
from ds_cp.model.checkpoint import StoredTensor
from ds_cp.text import show

# Names of the same thing in the configs of different families, and the largest value.
LAYERS = frozenset({
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
    "num_nextn_predict_layers", "first_k_dense_replace",
})  # fmt: skip
# Of these, those that count no layers of which the files hold weights.
NO_LAYERS = frozenset({"num_nextn_predict_layers", "first_k_dense_replace"})
HEADS = frozenset({
    "num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "num_kv_heads",
    "head_dim", "kv_channels", "multi_query_group_num",
})  # fmt: skip
SIZES = frozenset({
    "hidden_size", "intermediate_size", "vocab_size", "n_embd", "n_inner", "d_model", "ffn_dim",
    "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_local_experts",
    "n_routed_experts", "moe_num_experts", "q_lora_rank", "kv_lora_rank",
})  # fmt: skip
POSITIONS = frozenset({
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
    "original_max_position_embeddings", "sliding_window",
})  # fmt: skip
MAX = {
    **dict.fromkeys(LAYERS, 10_000), **dict.fromkeys(HEADS, 65_536),
    **dict.fromkeys(SIZES, 2**27), **dict.fromkeys(POSITIONS, 2**40),
}  # fmt: skip
# May be 0, for none of it.
MAY_BE_ZERO = frozenset({
    "num_nextn_predict_layers", "first_k_dense_replace", "n_inner", "sliding_window",
    "shared_expert_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts",
    "moe_num_experts", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "n_ctx",
    "max_seq_len", "seq_length",
})  # fmt: skip
# Keys that name the dtype of the weights, and its names.
DTYPE_KEYS = ("dtype", "torch_dtype")
DTYPES = (
    "float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2",
    "float", "half", "double",
)  # fmt: skip
# Keys that hold the parameters of the rotary embedding, and those of them that are numbers.
ROPE = ("rope_parameters", "rope_scaling")
ROPE_POSITIVE = frozenset({"rope_theta", "factor", "original_max_position_embeddings"})
ROPE_NUMBERS = ROPE_POSITIVE | {
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor",
    "high_freq_factor", "partial_rotary_factor", "short_mscale", "long_mscale",
}  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A quantized file packs up to so many values into one element: 2 bits each in 64-bit integers.
PACKED = 32
# A model whose parameters outnumber what the files hold by this lacks most of its weights. Below
# it, the names of those that are missing say more.
SPARE = 4


def check_values(where: str, config: Mapping[str, Any]) -> None:
    """Refuse counts and sizes of the decoder that cannot be; ``ModelError`` names the key."""
    for key, value in _parts(config):
        if key in MAX and value is not None and not isinstance(value, list):
            _check_count(where, key, value)
        if key in TOKEN_IDS:
            _check_ids(where, key, value)
        if key in DTYPE_KEYS and value not in (*DTYPES, None):
            raise _odd(where, key, value, f"one of {', '.join(DTYPES)}")
        if key.endswith(("_eps", "_epsilon")) and value is not None and not (
            _is_number(value) and value >= 0
        ):  # fmt: skip
            raise _odd(where, key, value, "a number from 0")
    if "model_type" in config and not isinstance(config["model_type"], str):
        raise _odd(where, "model_type", config["model_type"], "the name of an architecture")
    for part in _decoders(config):
        _check_heads(where, part)
        for key in ROPE:
            if part.get(key) is not None and not isinstance(part[key], Mapping):
                raise _odd(where, key, part[key], "an object")
            _check_rope(where, key, part.get(key))


def are_token_ids(value: Any) -> bool:
    """None, one id or a list of ids; a negative one, as -1, stands for none in some configs."""
    listed = value if isinstance(value, list) else [value]
    return all(
        i is None or (isinstance(i, int) and not isinstance(i, bool) and -(2**31) <= i < 2**31)
        for i in listed
    )


def check_sizes(
    where: str, config: Mapping[str, Any], stored: Mapping[str, StoredTensor], packed: bool
) -> None:
    """Refuse more layers, or sizes larger, than the files' tensors can be of. ``packed``: the
    weights are quantized."""
    if not stored:
        return
    # A key that this family does not read may say anything below.
    largest = max(math.prod(t.shape) for t in stored.values())
    for key, value in _parts(config):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if key in LAYERS - NO_LAYERS and value > len(stored):
            raise ModelError(
                f"model {where}: config.json's {key} is {value}, "
                f"but its files hold {len(stored)} tensors in all: "
                "config.json does not belong to these weights"
            )
        if key in SIZES | HEADS and value > SPARE * largest * (PACKED if packed else 1):
            raise ModelError(
                f"model {where}: config.json's {key} is {value}, "
                f"but the largest tensor in its files has {largest} elements: "
                "config.json does not belong to these weights"
            )


def check_parameters(where: str, model: Any, stored: Mapping[str, StoredTensor], packed: bool
) -> None:  # fmt: skip
    """Refuse a model, made without memory, that is far larger than what its files hold."""
    have = sum(math.prod(t.shape) for t in stored.values()) * (PACKED if packed else 1)
    need = sum(parameter.numel() for parameter in model.parameters())
    if stored and need > SPARE * have:
        name, largest = max(model.named_parameters(), key=lambda pair: int(pair[1].numel()))
        keys = [
            key for key, value in _parts(model.config.to_dict())
            if value in largest.shape and isinstance(value, int) and not isinstance(value, bool)
        ]  # fmt: skip
        by = f" by {', '.join(dict.fromkeys(keys))}" if keys else ""
        raise ModelError(
            f"model {where}: config.json makes it {need} parameters, {name} is "
            f"{list(largest.shape)}{by}, but its files hold {have}: "
            "config.json does not belong to these weights"
        )


def _check_count(where: str, key: str, value: Any) -> None:
    low = 0 if key in MAY_BE_ZERO else 1
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX[key]:
        raise _odd(where, key, value, f"an integer from {low} to {MAX[key]}")


def _check_ids(where: str, key: str, value: Any) -> None:
    if not are_token_ids(value):
        raise _odd(where, key, value, "a token id, or a list of ids")


def _check_heads(where: str, part: Mapping[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    kind = part.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        if not hasattr(CONFIG_MAPPING[kind], "num_key_value_heads"):
            return  # a key that this family does not read
    heads, kv_heads = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if not isinstance(heads, int):
        return
    if isinstance(kv_heads, int) and heads % kv_heads:
        raise _odd(where, "num_key_value_heads", kv_heads,
                   f"a divisor of num_attention_heads, which is {heads}")  # fmt: skip


def _check_rope(where: str, path: str, found: Any) -> None:
    """Parameters of the rotary embedding, which may be one set for each type of layer."""
    if not isinstance(found, Mapping):
        return
    plain = found.get("rope_type", found.get("type", "default")) == "default"
    for key, value in found.items():
        here = f"{path}.{key}"
        if isinstance(value, Mapping):
            _check_rope(where, here, value)
        may_be_null = key != "rope_theta" and (plain or key != "factor")
        sound = _is_number(value) and (value > 0 or key not in ROPE_POSITIVE)
        if key in ROPE_NUMBERS and not sound and not (value is None and may_be_null):
            positive = "positive " if key in ROPE_POSITIVE else ""
            raise _odd(where, here, value, f"a {positive}number below 2**63")
        listed = value if isinstance(value, list) else [value]
        if key in ("short_factor", "long_factor") and not all(map(_is_number, listed)):
            raise _odd(where, here, value, "a list of numbers")


def _is_number(value: Any) -> bool:
    """Finite, and within what a tensor can be multiplied by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) < 2**63


def _odd(where: str, key: str, value: Any, want: str) -> ModelError:
    return ModelError(
        f"model {where}: config.json's {key} is {show(value)}, but must be {want}: "
        "correct it, or fetch the model again"
    )


def _decoders(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and the part of it that describes the decoder of a larger model."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for part in _decoders(config):
        yield from part.items()
