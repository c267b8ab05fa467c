"""What a family of models has that its config.json does not say: biases, norms, experts.

One line a family, by ``model_type``, after its class in transformers 5.23; the tests compare every
line with that class. A flag that is text is the key of config.json that decides, false where it is
not there. A family that has no line is read as Llama's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Flag = bool | str


@dataclass(frozen=True)
class Family:
    """The parts of a decoder layer, and around them.

    ``norms``: vectors of the hidden size in the norms of a layer, ``final_norm`` those of the last
    one (a bias counts as one more); ``gated``: the feed-forward part has three matrices, not two;
    ``qk_norm``: norms of queries and keys, one for each dim of a head or of all heads;
    ``tied``: whether embedding and head are one matrix where config.json does not say;
    ``positions``: rows of a learned position table beyond the model's length, None without one;
    ``slides``: which layers have the window where no ``layer_types`` are given: none, all, all from
    ``max_window_layers`` on if ``use_sliding_window`` says so, or all but each n-th.
    """

    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: bool = False
    norms: int = 2
    final_norm: int = 1
    gated: bool = True
    qk_norm: Literal["", "head", "all"] = ""
    qk_norm_if: str = ""  # key of config.json that turns it on
    tied: bool = False
    positions: int | None = None
    slides: int | Literal["none", "all", "switch"] = "none"
    head_dim: int | None = None  # where config.json does not say
    sinks: Literal["", "all", "sliding"] = ""
    sliding_kv_factor: int = 1  # KV heads of a sliding layer over those of the others
    experts: Literal["", "all", "some"] = ""  # which layers have experts
    router_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False  # of a shared expert
    sparse_norms: int = 0  # more norms of a layer with experts
    multi_head: bool = False  # as many KV heads as query heads, whatever config.json says
    tp: bool = True  # whether its class states a split of attention for tensor parallelism
    mlp_split: bool = True  # and of the dense feed-forward part
    shared_split: bool = True  # and of shared experts
    twin: bool = False  # a layer has attention and a dense part twice


_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_BIASED = "attention_bias"
_LATENT = Family(_BIASED, _BIASED, experts="some", tp=False)  # its biases are of the latents
LLAMA_LIKE = _LLAMA

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(slides="all"),
    "mixtral": Family(slides="all", experts="all"),
    "qwen2": Family(qkv_bias=True, slides="switch"),
    "qwen3": Family(_BIASED, _BIASED, qk_norm="head", slides="switch", head_dim=128),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias", slides="switch", experts="some", shared_gate=True, shared_split=False
    ),
    "qwen3_moe": Family(_BIASED, _BIASED, qk_norm="head", slides="switch", experts="some"),
    "gemma": Family(_BIASED, _BIASED, tied=True, head_dim=256),
    "gemma2": Family(_BIASED, _BIASED, norms=4, tied=True, slides=2, head_dim=256),
    "gemma3_text": Family(
        _BIASED, _BIASED, norms=4, qk_norm="head", tied=True, slides=6, head_dim=256
    ),
    "phi": Family(
        True, True, True, head_bias=True, norms=2, final_norm=2, gated=False
    ),
    "phi3": Family(slides="all", tp=False),
    "olmo": Family(_BIASED, _BIASED, norms=0, final_norm=0),
    "olmo2": Family(_BIASED, _BIASED, qk_norm="all", tp=False),
    "olmo3": Family(_BIASED, _BIASED, qk_norm="all", slides=4, tp=False),
    "olmoe": Family(_BIASED, _BIASED, qk_norm="all", experts="all", tp=False),
    "starcoder2": Family(
        "use_bias", "use_bias", "use_bias", norms=4, final_norm=2, gated=False, tied=True,
        slides="all",
    ),
    "cohere": Family(_BIASED, _BIASED, norms=1, qk_norm="all", qk_norm_if="use_qk_norm", tied=True),
    "cohere2": Family(_BIASED, _BIASED, norms=1, tied=True, slides=4),
    "granite": _LLAMA,
    "granitemoe": Family(_BIASED, _BIASED, experts="all", tp=False),
    "glm": Family(qkv_bias=_BIASED, head_dim=128, mlp_split=False),
    "glm4": Family(qkv_bias=_BIASED, norms=4, head_dim=128, mlp_split=False),
    "glm4_moe": Family(
        qkv_bias=_BIASED, qk_norm="head", qk_norm_if="use_qk_norm", experts="some"
    ),
    "smollm3": Family(_BIASED, _BIASED, mlp_bias="mlp_bias", tied=True, slides="switch"),
    "seed_oss": Family(_BIASED, "attention_out_bias", "mlp_bias"),
    "arcee": Family(_BIASED, _BIASED, "mlp_bias", gated=False),
    "exaone4": Family(qk_norm="head", slides=4),
    "gpt2": Family(
        True, True, True, norms=4, multi_head=True, final_norm=2, gated=False, tied=True,
        positions=0, tp=False,
    ),
    "gpt_neox": Family(
        _BIASED, _BIASED, True, norms=4, multi_head=True, final_norm=2, gated=False, tp=False
    ),
    "opt": Family(
        True, True, True, norms=4, multi_head=True, final_norm=2, gated=False, tied=True,
        positions=2, tp=False,
    ),
    "gpt_oss": Family(
        _BIASED, _BIASED, slides=2, sinks="all", experts="all", router_bias=True, expert_bias=True,
        tp=False,
    ),
    "ernie4_5": Family("use_bias", "use_bias", "use_bias", tied=True, head_dim=128),
    "ernie4_5_moe": Family(
        "use_bias", "use_bias", "use_bias", tied=True, experts="some", router_bias=True
    ),
    "deepseek_v2": Family(_BIASED, _BIASED, experts="some"),
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": Family(_BIASED, _BIASED, experts="some", shared_split=False),
    "axk1": Family(_BIASED, _BIASED, experts="some", sparse_norms=1, tp=False),
    "youtu": Family(_BIASED, _BIASED, tied=True, tp=False),
    "minicpm3": Family(_BIASED, _BIASED, tied=True),
    "longcat_flash": Family(_BIASED, _BIASED, experts="all", twin=True),
    "mimo_v2_flash": Family(
        _BIASED, _BIASED, sinks="sliding", sliding_kv_factor=2, experts="some"
    ),
}  # fmt: skip
