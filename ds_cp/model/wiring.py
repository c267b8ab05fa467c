"""An unmodified transformers decoder whose attention goes through ``Attend``.

Registered once with transformers' attention interface under the name ``ds_cp``; the step's context
travels as a keyword of the forward call through every layer, so there is nothing global. What a
layer says about its attention is read from the keywords it passes; an unknown one is refused, not
ignored.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ds_cp.attention.spec import LayerSpec
from ds_cp.errors import UnsupportedModelError
from ds_cp.model.faults import reason

Decoder = PreTrainedModel  # a causal decoder with its language-model head

NAME = "ds_cp"  # of the attention in transformers' registry
WINDOWS = "ds_cp_windows"  # attribute of the config that is there while a model is probed
CONTEXT = "ds_cp_context"  # keyword of the forward call that carries the step
# Keywords that layers pass along and that change nothing for causal inference over true positions.
HARMLESS = frozenset(
    {"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "return_dict",
     "output_hidden_states", "output_router_logits", "logits_to_keep", "position_embeddings"}
)  # fmt: skip
KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Layer types of transformers' configs that are not softmax attention over all earlier tokens or
# over a window, and what they are instead.
OTHER_LAYER_TYPES = {
    "chunked_attention": "queries see their own chunk of the sequence only",
    "compressed_sparse_attention": "keys of several tokens are compressed into one",
    "heavily_compressed_attention": "keys of many tokens are compressed into one",
    "indexed_attention": "sparse: an indexer picks the keys that a query sees",
    "linear_attention": "a recurrent state stands for the keys",
    "noncausal_full_attention": "queries see later tokens",
}


class Attend(Protocol):
    """One step's attention, asked layer by layer."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``q [1, H, T, D]``, ``k [1, G, T, D]``, rotated, and ``v [1, G, T, Dv]`` ->
        ``[1, T, H, Dv]``."""
        ...


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **said: Any,
) -> tuple[torch.Tensor, None]:
    context = said.pop(CONTEXT, None)
    if context is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not get the keywords of the forward call, "
            "which carry the step"
        )
    if isinstance(context, _Probe):
        context.record(module, query, key, value, attention_mask, said)
    return context.attend(module.layer_idx, query, key, value), None


def _no_mask(*_: Any, config: Any = None, local_size: int | None = None, **__: Any) -> None:
    """Causality follows from positions, so no mask is ever built. While a model is probed its
    config carries a list for the windows that its masks would have had."""
    windows = getattr(config, WINDOWS, None)
    if windows is not None and local_size is not None:
        windows.append(local_size)


def wire(model: Decoder) -> None:
    """Send the model's attention through ``Attend``."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


class _Probe:
    """The context of a forward call of one token that records what each layer asks for."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self.layers: dict[int, LayerSpec] = {}
        self.modules: dict[int, nn.Module] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])

    def record(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        said: dict[str, Any],
    ) -> None:
        said = dict(said)
        scale = said.pop("scaling", None)
        window = said.pop("sliding_window", None)
        softcap = said.pop("softcap", None)
        sinks = said.pop("s_aux", None)
        causal = said.pop("is_causal", getattr(module, "is_causal", True))
        unknown = sorted(k for k, v in said.items() if k not in HARMLESS and v is not None)
        where = f"{self._architecture}, layer {module.layer_idx}"
        if unknown:
            raise UnsupportedModelError(
                f"{where} passes {', '.join(unknown)} to its attention, which ds_cp does not know"
            )
        if causal is False:
            raise UnsupportedModelError(f"{where} is not causal; ds_cp serves causal decoders")
        if k.shape[:3] != v.shape[:3] or k.shape[2] != 1 or q.shape[3] != k.shape[3]:
            raise UnsupportedModelError(
                f"{where} gives its attention queries {list(q.shape)}, keys {list(k.shape)} and "
                f"values {list(v.shape)} for one token; ds_cp stores one key and value a token"
            )
        if mask is not None:
            raise UnsupportedModelError(f"{where} builds its own attention mask")
        if module.layer_idx in self.layers:
            raise UnsupportedModelError(
                f"{where} runs attention twice; ds_cp stores one KV a layer"
            )
        self.modules[module.layer_idx] = module
        self.layers[module.layer_idx] = LayerSpec(
            num_q_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            scale=float(scale) if scale is not None else q.shape[3] ** -0.5,
            window=int(window) if window else None,
            softcap=float(softcap) if softcap else None,
            sinks=sinks.detach() if sinks is not None else None,
            v_head_dim=None if v.shape[3] == q.shape[3] else v.shape[3],
        )


def probe_layers(model: Decoder) -> list[LayerSpec]:
    """What each layer's attention asks for, by layer index (see ``probe``)."""
    return [spec for spec, _ in probe(model)]


def probe(model: Decoder) -> list[tuple[LayerSpec, nn.Module]]:
    """What each layer's attention asks for, and the module that asks, by layer index.

    Runs one token, and leaves the model wired.

    Raises ``UnsupportedModelError``, naming the architecture, when some layer is not plain softmax
    attention through the interface (state-space and linear layers, sparse and chunked ones).
    """
    config = model.config
    text = config.get_text_config()
    name = type(model).__name__
    if kinds := _other_kinds(model):
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(kinds)}; "
            "ds_cp serves decoders whose layers are all full or sliding-window softmax attention"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; ds_cp serves decoders only")
    seen = _Probe(name)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    windows: list[int] = []
    try:
        wire(model)
        for each in (config, text):
            setattr(each, WINDOWS, windows)
        with torch.inference_mode():
            model(input_ids=token, position_ids=token, use_cache=False, **{CONTEXT: seen})
    except (TypeError, ValueError, KeyError, AttributeError) as err:
        raise UnsupportedModelError(
            f"{name} does not run through transformers' attention interface: {reason(err)}"
        ) from err
    finally:
        for each in (config, text):
            each.__dict__.pop(WINDOWS, None)
    want = list(range(text.num_hidden_layers))
    if sorted(seen.layers) != want:
        missing = sorted(set(want) - set(seen.layers))
        raise UnsupportedModelError(
            f"{name}: layers {missing[:8]} of {len(want)} do not use softmax attention "
            "through the attention interface, so their state cannot be spread over ranks"
        )
    if sliding := [i for i, kind in enumerate(getattr(text, "layer_types", None) or ())
                   if kind == "sliding_attention" and seen.layers[i].window is None]:  # fmt: skip
        raise UnsupportedModelError(f"{name}: layers {sliding[:8]} slide but do not state a window")
    if getattr(text, "layer_types", None) is None:  # one mask for all layers
        _check_stated(name, text, windows, {spec.window for spec in seen.layers.values()})
    return [(seen.layers[i], seen.modules[i]) for i in want]


def _check_stated(name: str, text: Any, masked: list[int], stated: set[int | None]) -> None:
    """Refuse a window that is in the mask alone, which is not built here. One as long as the model
    masks nothing."""
    longest = getattr(text, "max_position_embeddings", None)
    short = {w for w in masked if longest is None or w < longest} - stated
    if short:
        raise UnsupportedModelError(
            f"{name} masks all but {min(short)} tokens, but its layers do not state a window"
        )


def _other_kinds(model: Decoder) -> list[str]:
    """Types of layers that ds_cp does not serve, each with what it is where that is known."""
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    # A config may call a layer full attention whose module has an indexer all the same.
    if any(type(module).__name__.endswith("Indexer") for module in model.modules()):
        types.add("indexed_attention")
    kinds = sorted(types - KNOWN_LAYER_TYPES)
    return [f"{k} ({OTHER_LAYER_TYPES[k]})" if k in OTHER_LAYER_TYPES else k for k in kinds]


def check_positions(model: Decoder, max_model_len: int) -> None:
    """Refuse rotary embeddings that depend on how long the sequence has become.

    With these the angles of all keys change when a sequence outgrows a limit, but keys are stored
    rotated. So only lengths up to that limit are exact: ``UnsupportedModelError`` beyond.
    """
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [v for v in found.values() if isinstance(v, dict)] or [found]
    for rope in nested:
        kind = rope.get("rope_type", "default")
        config = model.config.get_text_config()
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind in ("dynamic", "longrope") and max_model_len > limit:
            raise UnsupportedModelError(
                f"{type(model).__name__} uses {kind} rotary embeddings, "
                f"which change beyond {limit} tokens: set max_model_len to at most {limit}"
            )
