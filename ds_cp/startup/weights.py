"""How many of a model's parameters a token passes: of its experts only those it is routed to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_cp.model.wiring import Decoder

# As the configs of transformers' mixture-of-experts models name them.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Parameters on this rank. ``active``: that one token passes, of all; ``layers``: of the layers
    alone; ``stored``: the same with the experts that it does not pass; ``head``: from the last
    hidden state to logits, which only a token that draws another one passes."""

    active: int
    layers: int
    stored: int
    head: int


def count_weights(model: Decoder) -> Weights:
    """Embeddings are looked up: they count in ``active`` alone."""
    get_head: Callable[[], nn.Module | None] = model.get_output_embeddings
    ends = (model.get_input_embeddings(), get_head())
    outer = {id(p): p.numel() for end in ends if end is not None for p in end.parameters()}
    inner = sum(p.numel() for p in model.parameters()) - sum(outer.values())
    head = ends[1].parameters() if ends[1] is not None else ()
    active = active_weights(model)
    return Weights(active, active - sum(outer.values()), inner, sum(p.numel() for p in head))


def active_weights(model: Decoder) -> int:
    """Parameters on this rank that one token passes.

    Those below a module called ``experts`` count by the share of experts that the router picks;
    shared experts have a module of their own and count whole.
    """
    share = _active_share(model.config.get_text_config())
    routed = sum(p.numel() for name, p in model.named_parameters() if _is_routed(name))
    total = sum(p.numel() for p in model.parameters())
    return total - routed + round(routed * share)


def _is_routed(name: str) -> bool:
    return "experts" in name.split(".")


def _active_share(text: Any) -> float:
    experts, active = _first(text, NUM_EXPERTS), _first(text, ACTIVE_EXPERTS)
    return min(1.0, active / experts) if experts and active else 1.0


def _first(text: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(text, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
