"""A checkpoint is consumed or refused: what its files hold, against what reached the model.

transformers drops tensors that have no place in the model. Scales of quantized weights, biases that
the config leaves out and layers that it does not count are then silently missing. Only parts
of a known kind that text generation does not need may stay unread, and a note says which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ds_cp.errors import ModelError
from ds_cp.model.checkpoint import Checkpoint, StoredTensor, some
from ds_cp.model.wiring import Decoder

# safetensors dtypes that a layer of floating-point weights is served in; masks may be boolean and
# positions 64-bit integers. Everything else is a quantized or packed format.
PLAIN = frozenset({"F64", "F32", "F16", "BF16", "BOOL", "I64"})
# Dtypes that can hold NaN and infinity.
SUMMABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

# Buffers that the model computes for itself.
BUFFER = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids|attn\.masked_bias)$")
# Ranges of an 8-bit KV cache; ds_cp keeps KV in the model's dtype.
KV_RANGE = re.compile(r"(^|\.)([kv]_scale|[kv]_zero_point|[kv]_proj\.(output_scale|[kv]_scale))$")
# Ranges of 8-bit activations, which are not quantized where transformers decodes the weights.
ACTIVATION_RANGE = re.compile(r"\.(input|activation)_scale$")
# Parts beside the decoder, by the first component of the name that the model does not have.
OTHER_PART = re.compile(
    r"vision|visual|image|video|audio|speech|multi_?modal|^mm_|projector|connector|aligner"
    r"|resampler|perceiver|siglip|clip|^vit$|^mlp1$|talker|token2wav|code2wav"
    r"|^mtp|nextn|eagle|medusa|^v_head$|value_head"
)


@dataclass(frozen=True)
class Loaded:
    """What transformers reports of a load, names as in the model.

    ``missing``: parameters that no file holds. ``unexpected``: stored tensors without a place.
    ``misshaped``: name, stored shape, shape in the model.
    """

    missing: Collection[str]
    unexpected: Collection[str]
    misshaped: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Loaded:
        """From ``output_loading_info``."""
        misshaped = [(n, tuple(a), tuple(b)) for n, a, b in info["mismatched_keys"]]
        return cls(info["missing_keys"], info["unexpected_keys"], misshaped)


def check_consumed(
    model: Decoder,
    where: str,
    stored: Mapping[str, StoredTensor],
    loaded: Loaded,
    quantized: bool,
) -> list[str]:
    """Refuse a load that left out, made up or misread a tensor; lines on what may stay unread.

    ``where``: the model's path or hub id. ``stored``: the files' headers; empty for GGUF, which
    transformers decodes block by block. ``quantized``: the config names a quantization that
    transformers reads. Raises ``ModelError`` that names the first tensors.
    """
    _check_shapes(model, where, stored, loaded)
    if not quantized:
        _check_plain(model, where, stored)
    unread: Counter[str] = Counter()
    refused = []
    for name in _ordered(loaded.unexpected):
        part = _unread_part(model, name)
        if part is None and quantized and ACTIVATION_RANGE.search(name):
            part = "ranges of 8-bit activations"
        if part is None:
            refused.append(name)
        else:
            unread[part] += 1
    if refused:
        raise ModelError(
            f"model {where} holds {_tensors(len(refused))} "
            f"that {type(model).__name__} does not read, the first {_are(refused)}: "
            "config.json does not describe these weights, "
            "or they are quantized in a way that this transformers does not know"
        )
    if loaded.missing:  # transformers would make them up at random
        lost = _ordered(loaded.missing)
        raise ModelError(
            f"model {where} lacks {len(lost)} of its weights, the first {_are(lost)}: "
            "fetch the model again, or check that its config.json belongs to its weights"
        )
    unread.update(_ignored_by_class(model, stored))
    return [*_unread_note(unread), *_untied_note(model)]


def check_index(model: Decoder, where: str, checkpoint: Checkpoint) -> None:
    """Refuse an index that lists a tensor that no file holds, unless it is one of two that the
    model ties, or one that it does not read. Raises ``ModelError`` that names the first tensor."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {_tail(name) for name in chain(ties.keys(), ties.values())}
    lost = [
        name
        for name in checkpoint.absent
        if _tail(name) not in tied
        and _unread_part(model, name) is None
        and not _matches(model, name)
    ]
    if lost:
        raise ModelError(
            f"model {where}: {checkpoint.index} lists {_tensors(len(lost))} that no file holds, "
            f"the first {_are(lost)}: fetch the model again"
        )


def check_finite(model: Decoder, where: str, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse NaN and infinity in parameters and stored buffers; reads every weight once.

    A sum is finite only if all of its terms are, so a tensor is looked at in detail only when its
    sum is not finite. Raises ``ModelError`` that names the first tensor.
    """
    kept = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
    for name, tensor in chain(model.named_parameters(), buffers):
        if tensor.dtype not in SUMMABLE or torch.isfinite(tensor.detach().sum()):
            continue
        if count := int((~torch.isfinite(tensor)).sum()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            file = f" ({stored[name].file})" if name in stored else ""
            way_out = (
                "set dtype to fp32 if its values are too large for it, or fetch the model again"
                if tensor.dtype == torch.float16
                else "fetch the model again"
            )
            raise ModelError(
                f"model {where}: {name}{file} "
                f"holds {count} NaN or infinite value{'s' * (count != 1)} in {dtype}: {way_out}"
            )


def count_elements(model: Decoder) -> int:
    """Elements of the model's parameters and stored buffers; a tied weight counts once."""
    kept = model.state_dict().keys()
    buffers = (buffer for name, buffer in model.named_buffers() if name in kept)
    return sum(tensor.numel() for tensor in chain(model.parameters(), buffers))


def _check_shapes(
    model: Decoder, where: str, stored: Mapping[str, StoredTensor], loaded: Loaded
) -> None:
    if not loaded.misshaped:
        return
    shapes = {name: (there, here) for name, there, here in loaded.misshaped}
    first = _ordered(shapes)[0]
    there, here = shapes[first]
    file = f" in {stored[first].file}" if first in stored else ""
    vocab = model.config.get_text_config().vocab_size
    hint = ""
    if here[:1] == (vocab,) and there[1:] == here[1:]:
        hint = f"; config.json's vocab_size is {vocab}, the weights have {there[0]} tokens"
    raise ModelError(
        f"model {where}: {first} has shape {list(there)}{file}, "
        f"but config.json makes it {list(here)} ({len(shapes)} such){hint}: "
        "config.json does not belong to these weights"
    )


def _check_plain(model: Decoder, where: str, stored: Mapping[str, StoredTensor]) -> None:
    """Quantized values that were cast to floating point as if they were the weights."""
    state = model.state_dict()
    packed = [
        name
        for name, tensor in stored.items()
        if tensor.dtype not in PLAIN
        and not (name in state and not state[name].is_floating_point())
        and _unread_part(model, name) is None
        and not _matches(model, name)
    ]
    if packed:
        kinds = ", ".join(sorted({stored[name].dtype for name in packed}))
        raise ModelError(
            f"model {where} stores {_tensors(len(packed))} in {kinds}, the first {_are(packed)}, "
            "but its config.json names no quantization that says how to read them: "
            "serve an unquantized copy, or one whose quantization_config transformers knows"
        )


def _unread_part(model: Decoder, name: str) -> str | None:
    """The part of the checkpoint that a tensor without a place belongs to, where it may stay
    unread; ``None`` for a tensor that the decoder should have read."""
    if found := BUFFER.search(name):
        return f"{found.group(0).lstrip('.')} (computed)"
    if KV_RANGE.search(name):
        return "ranges of an 8-bit KV cache"
    at: nn.Module = model
    path = name.split(".")
    for depth, part in enumerate(path):
        children = dict(at.named_children())
        if part in children:
            at = children[part]
            continue
        here = ".".join(path[: depth + 1]) + ".*" * (depth < len(path) - 1)
        if isinstance(at, nn.ModuleList):
            spare = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
            extra = part.isdigit() and len(at) <= int(part) < len(at) + spare
            return f"{here} (next-token prediction)" if extra else None
        inside_a_layer = any(p.isdigit() for p in path[:depth])
        return here if OTHER_PART.search(part) and not inside_a_layer else None
    return None


def _matches(model: Decoder, name: str) -> bool:
    """Whether the model's class itself says that a tensor of this name is not to be read."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _tail(name: str) -> str:
    """The layer and the tensor of a name: "lm_head.weight"; prefixes differ between files."""
    return ".".join(name.split(".")[-2:])


def _ignored_by_class(model: Decoder, stored: Iterable[str]) -> Counter[str]:
    """Stored tensors that transformers leaves out of its report."""
    state = model.state_dict().keys()
    found: Counter[str] = Counter()
    for name in stored:
        # A file may hold the model without its head, whose names lack the model's prefix.
        if name in state or f"{model.base_model_prefix}.{name}" in state:
            continue
        if BUFFER.search(name):
            found[_unread_part(model, name) or name] += 1
        elif _matches(model, name):
            generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            found[_unread_part(model, name) or generic] += 1
    return found


def _unread_note(unread: Counter[str]) -> list[str]:
    if not unread:
        return []
    parts = some(f"{part} ({count})" for part, count in sorted(unread.items()))
    return [f"of the checkpoint's tensors {unread.total()} are not used: {parts}"]


def _untied_note(model: Decoder) -> list[str]:
    """transformers keeps a head of its own where the weights hold one, whatever the config says."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return []
    parts: Any = model  # the first of these two methods states no types
    head, embedding = parts.get_output_embeddings(), parts.get_input_embeddings()
    if head is None or embedding is None or head.weight is embedding.weight:
        return []
    return [
        "config.json ties the head to the embedding, "
        "but the weights hold a head of their own with other values: both are used as stored"
    ]


def _ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of their layers: 2 before 10."""
    return sorted(names, key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else 0, p)
                                           for p in name.split(".")])  # fmt: skip


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _are(names: list[str]) -> str:
    return f"{'is' if len(names) == 1 else 'are'} {some(names)}"
