"""The shape of a model's attention for rules and costs that take one: the mean over its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_cp.attention import LayerSpec


@dataclass(frozen=True)
class MeanShape:
    """What a layer costs on average, on this rank: heads and dims such that its operations, 4 x
    query heads x dim for each pair of tokens, and its KV, 2 x KV heads x dim elements a token, are
    the layers' mean. ``head_dim`` is between that of keys and that of values."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int


def mean_shape(layers: Sequence[LayerSpec]) -> MeanShape:
    """The mean over ``layers``, rounded; that of each layer where they are alike."""
    q_heads = _mean([spec.num_q_heads for spec in layers])
    work = _mean([spec.num_q_heads * (spec.head_dim + spec.v_dim) for spec in layers])
    kept = _mean([spec.num_kv_heads * (spec.head_dim + spec.v_dim) for spec in layers])
    dim = work / (2.0 * q_heads)
    return MeanShape(round(q_heads), max(1, round(kept / (2.0 * dim))), round(dim))


def layer_windows(layers: Sequence[LayerSpec]) -> tuple[tuple[int, int], ...]:
    """(window, number of layers that have it), ascending; layers without one are not counted."""
    return tuple(sorted(Counter(spec.window for spec in layers if spec.window).items()))


def shape_notes(layers: Sequence[LayerSpec], tp_size: int) -> list[str]:
    """A line where keys and values have different dims, or layers different shapes, else none."""

    def values(what: str, of: Callable[[LayerSpec], int]) -> str:
        found = sorted({of(spec) for spec in layers})
        return f"{' or '.join(map(str, found))} {what}" if len(found) > 1 else ""

    said = [
        values("query heads", lambda s: s.num_q_heads * tp_size),
        values("KV heads", lambda s: s.num_kv_heads * tp_size),
    ]
    dims = sorted({(spec.head_dim, spec.v_dim) for spec in layers})
    if len(dims) > 1 or dims[0][0] != dims[0][1]:
        said.append(" or ".join(f"keys of {k} and values of {v}" for k, v in dims) + " dims")
    said = [part for part in said if part]
    return [f"attention layers have {', '.join(said)}"] if said else []


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
