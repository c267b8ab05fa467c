"""The parameters of a decoder's layers, and their attention, from config.json and the family."""

from __future__ import annotations

from dataclasses import dataclass

from ds_cp.errors import ModelError, UnsupportedModelError
from ds_cp.sizing.config_json import ConfigJson
from ds_cp.sizing.families import Family

# As the configs of mixtures of experts name them.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip
EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
KNOWN_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LayerShape:
    """One layer. ``split``: parameters that tensor parallelism shares out, ``whole``: that every
    rank has, ``experts``: of routed experts, whole on every rank, ``active_experts``: of those that
    one token passes. The rest as in ``ds_cp.attention.LayerSpec``, for the whole model."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    window: int | None
    split: int
    whole: int
    experts: int = 0
    active_experts: int = 0

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.split + self.whole + self.experts

    def of_rank(self, tp: int) -> int:
        """Those of one of ``tp`` ranks."""
        return -(-self.split // tp) + self.whole + self.experts


def layer_shapes(
    config: ConfigJson, family: Family, hidden: int, count: int
) -> tuple[tuple[LayerShape, ...], int]:
    """The layers of attention, in order, and the widest feed-forward part that a token passes.

    ``ModelError`` for sizes that do not fit, ``UnsupportedModelError`` for layers that are not full
    or sliding softmax attention.
    """
    windows = _windows(config, family, count)
    sparse = _sparse(config, family, count)
    found, widest = [], 1
    for window, has_experts in zip(windows, sparse, strict=True):
        layer = _attention(config, family, hidden, window)
        norms = family.norms * hidden
        wide = 0
        split, whole, experts, active = layer.split, layer.whole + norms, 0, 0
        if not has_experts or family.twin:
            wide = _dense_width(config, hidden)
            inside, outside = _feed_forward(config, family, hidden, wide)
            if not family.mlp_split:
                inside, outside = 0, inside + outside
            split, whole = split + inside, whole + outside
        if family.twin:
            found.append(_with(layer, split, whole, 0, 0))
        if has_experts:
            inside, outside, experts, active, routed = _experts(config, family, hidden)
            wide = max(wide, routed)
            split, whole = split + inside, whole + outside + family.sparse_norms * hidden
        widest = max(widest, wide)
        found.append(_with(layer, split, whole, experts, active))
    return tuple(found), widest


def _with(layer: LayerShape, split: int, whole: int, experts: int, active: int) -> LayerShape:
    return LayerShape(
        layer.num_q_heads, layer.num_kv_heads, layer.head_dim, layer.v_dim, layer.window,
        split, whole, experts, active,
    )  # fmt: skip


def _attention(config: ConfigJson, family: Family, hidden: int, window: int | None) -> LayerShape:
    heads = config.number("num_attention_heads", "n_head", most=1 << 20)
    if config.maybe("kv_lora_rank"):
        return _latent_attention(config, family, hidden, heads, window)
    kv_heads = heads
    if not family.multi_head:
        kv_heads = config.number("num_key_value_heads", default=heads, most=1 << 20)
    if window is not None:
        kv_heads *= family.sliding_kv_factor
    if heads % kv_heads:
        raise ModelError(
            f"{config.where}: {heads} query heads cannot share {kv_heads} KV heads evenly"
        )
    dim = config.maybe("head_dim") or family.head_dim
    if dim is None:
        if hidden % heads:
            raise ModelError(
                f"{config.where}: hidden_size {hidden} does not divide by {heads} heads, "
                "and head_dim is not said"
            )
        dim = hidden // heads
    v_dim = config.number("v_head_dim", default=dim)
    qkv = heads * dim + kv_heads * (dim + v_dim)
    split = qkv * hidden + heads * v_dim * hidden
    split += qkv if config.flag(family.qkv_bias) else 0
    whole = hidden if config.flag(family.out_bias) else 0
    if family.qk_norm and (not family.qk_norm_if or config.flag(family.qk_norm_if)):
        whole += 2 * dim if family.qk_norm == "head" else (heads + kv_heads) * dim
    if family.sinks == "all" or (family.sinks and window is not None):
        split += heads
    return LayerShape(heads, kv_heads, dim, v_dim, window, split, whole)


def _latent_attention(
    config: ConfigJson, family: Family, hidden: int, heads: int, window: int | None
) -> LayerShape:
    """Keys and values come from a latent, expanded: every query head has a KV head of its own
    (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    latent = config.number("kv_lora_rank")
    nope = config.number("qk_nope_head_dim")
    rope = config.number("qk_rope_head_dim")
    v_dim = config.number("v_head_dim")
    rank = config.maybe("q_lora_rank")
    dim, biased = nope + rope, config.flag(family.qkv_bias)
    whole = hidden * (latent + rope) + latent + (latent + rope if biased else 0)
    split = latent * heads * (nope + v_dim) + heads * v_dim * hidden
    if rank:
        whole += hidden * rank + rank + (rank if biased else 0)
        split += rank * heads * dim
    else:
        split += hidden * heads * dim
    whole += hidden if config.flag(family.out_bias) else 0
    return LayerShape(heads, heads, dim, v_dim, window, split, whole)


def _dense_width(config: ConfigJson, hidden: int) -> int:
    if "n_embd" in config:
        return config.number("n_inner", default=4 * hidden)
    return config.number("ffn_dim", "ffn_hidden_size", "intermediate_size")


def _feed_forward(config: ConfigJson, family: Family, hidden: int, width: int) -> tuple[int, int]:
    """Parameters that are split, and whole ones."""
    ways = 2 if family.gated else 1
    split, whole = (ways + 1) * hidden * width, 0
    if config.flag(family.mlp_bias):
        split, whole = split + ways * width, hidden
    return split, whole


def _experts(config: ConfigJson, family: Family, hidden: int) -> tuple[int, int, int, int, int]:
    """Split and whole parameters besides routed experts, those of all routed experts, of those
    that a token passes, and the width that it passes in all."""
    number = config.number(*NUM_EXPERTS, most=1 << 20)
    active = min(number, config.number(*ACTIVE_EXPERTS, default=1, most=1 << 20))
    zero = config.number("zero_expert_num", default=0, least=0) if family.twin else 0
    width = config.number(*EXPERT_WIDTH, "intermediate_size")
    each = 3 * hidden * width + (2 * width + hidden if family.expert_bias else 0)
    total = number * each + zero * 2 * width * hidden  # their first matrices are there, unused
    whole = (number + zero) * hidden + (number if family.router_bias else 0)
    shared = config.maybe("shared_expert_intermediate_size") if family.shared_gate else None
    if shared is None:
        many = config.number("n_shared_experts", "moe_num_shared_experts", default=0, least=0)
        shared = many * width
    split = 3 * hidden * shared
    if not family.shared_split:
        split, whole = 0, whole + split
    if shared and family.shared_gate:
        whole += hidden
    share = active / (number + zero)
    return split, whole, total, round(total * share), active * width + shared


def _windows(config: ConfigJson, family: Family, count: int) -> list[int | None]:
    """The window of each layer; None without one."""
    types = config.words("layer_types", count)
    if types is not None:
        if other := sorted(set(types) - set(KNOWN_TYPES)):
            raise UnsupportedModelError(
                f"{config.where} has layers of type {', '.join(other)[:200]}; ds_cp serves "
                "decoders whose layers are all full or sliding-window softmax attention"
            )
        if "sliding_attention" not in types:
            return [None] * count
        window = config.number("sliding_window")
        return [window if each == "sliding_attention" else None for each in types]
    width = config.maybe("sliding_window")
    slides = family.slides
    if width is None or slides == "none":
        return [None] * count
    if slides == "all":
        return [width] * count
    if slides == "switch":
        first = config.number("max_window_layers", default=0, least=0)
        on = config.flag("use_sliding_window")
        return [width if on and i >= first else None for i in range(count)]
    every = config.number("sliding_window_pattern", "_sliding_window_pattern", default=slides)
    return [width if (i + 1) % every else None for i in range(count)]


def _sparse(config: ConfigJson, family: Family, count: int) -> list[bool]:
    """Which layers have experts."""
    if not family.experts:
        return [False] * count
    if family.experts == "all":
        return [True] * count
    types = config.words("mlp_layer_types", count)
    if types is not None:
        return [each == "sparse" for each in types]
    first = config.number("first_k_dense_replace", "moe_layer_start_index", default=0, least=0)
    last = config.number("moe_layer_end_index", default=count - 1, least=0)
    every = config.number("moe_layer_interval", "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ModelError(f"{config.where}: mlp_only_layers must be a list of layers")
    return [first <= i <= last and (i + 1) % every == 0 and i not in dense for i in range(count)]
