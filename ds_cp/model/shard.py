"""Tensor parallel inside cp: split a loaded decoder's linear layers over the ranks of one tp group.

Which layers split by output (column) and by input (row) is what the model class itself states in
``base_model_tp_plan``; the split is done by hand because transformers 5.23 shards by the world's
size inside a larger job and DeepSpeed's AutoTP leaves such a model whole without a word
(DECISIONS.md). What the plan marks otherwise (norms, experts, gathered projections) stays whole on
every rank, which is exact too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ds_cp.comm.wire import Group
from ds_cp.errors import CommError, ConfigError, UnsupportedModelError
from ds_cp.model.wiring import Decoder

SCHEME = "tp_all_reduce"  # name in the ledger


@dataclass(frozen=True)
class _RowSum:
    """One sum of a forward call: elements for each token of the batch, and their dtype."""

    elements: int
    dtype: torch.dtype


class RowSums:
    """The sums over ``group`` that a sharded model's row layers ask for in a forward call.

    ``recording`` runs a call without them, on this rank alone, and learns which they are;
    ``expected`` runs calls that every rank of the group makes, and completes their sums if this
    rank's call fails in between, so that no other rank waits for it.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._of_a_call: list[_RowSum] = []
        self._recording = False
        self._pending: list[tuple[int, torch.dtype]] = []

    def add(self, out: torch.Tensor) -> torch.Tensor:
        """Sum ``out`` (``[1, T, F]``, this rank's part) over the group."""
        out = out.contiguous()
        if self._recording:
            self._of_a_call.append(_RowSum(out.numel(), out.dtype))
            return out
        self.group.all_reduce(out, SCHEME)
        if self._pending:
            self._pending.pop(0)
        return out

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within: forward calls of one token exchange nothing; their numbers mean nothing."""
        self._of_a_call, self._recording = [], True
        try:
            yield
        finally:
            self._recording = False

    @contextmanager
    def expected(self, tokens: Sequence[int]) -> Iterator[None]:
        """Within: one forward call after another, of ``tokens[i]`` tokens each.

        After an error the sums that are left are made over zeros. Not after a ``CommError``:
        the group is broken then.
        """
        self._pending = [(t * s.elements, s.dtype) for t in tokens for s in self._of_a_call]
        try:
            yield
        except CommError:
            raise
        except BaseException:
            for elements, dtype in self._pending:
                self.group.all_reduce(
                    torch.zeros(elements, dtype=dtype, device=self.group.device), SCHEME
                )
            raise
        finally:
            self._pending = []


def shard_model(model: Decoder, sums: RowSums) -> int:
    """Keep this rank's share of every column and row layer, and of what the plan splits by heads;
    returns how many layers were split.

    Row layers then add up their parts through ``sums``. Call it before the KV pool is sized. A
    group of one splits nothing. Raises ``ConfigError`` when the head counts do not divide,
    ``UnsupportedModelError`` when the model states no plan.
    """
    group = sums.group
    if group.size == 1:
        return 0
    text = model.config.get_text_config()
    name = type(model).__name__
    plan = getattr(text, "base_model_tp_plan", None) or {}
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, what, None)
        if heads is None or heads % group.size:
            raise ConfigError(
                f"tensor_parallel.tp_size is {group.size}, but {name} has {what} = {heads}, "
                "which it does not divide; "
                "use context parallel ranks instead (any number of them works)"
            )
    layers = text.num_hidden_layers
    found = [
        (path, module, style)
        for path, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear) and (style := _style(path, plan)) in ("colwise", "rowwise")
    ]
    attention = [path for path, _, style in found if style == "rowwise" and "attn" in path]
    if len(attention) != layers:
        raise UnsupportedModelError(
            f"{name} states no column / row split for its attention "
            f"({len(attention)} of {layers} layers), so tensor_parallel.tp_size must be 1"
        )
    for path, module, style in found:
        if style == "colwise":
            _split_columns(path, module, group)
        else:
            _split_rows(path, module, sums)
    for path, parameter in list(model.base_model.named_parameters()):
        # One number a head that belongs to no linear layer, such as attention sinks.
        if parameter.ndim == 1 and _style(path, plan) == "colwise":
            _split_per_head(path, parameter, model.base_model, group)
    return len(found)


def _style(path: str, plan: dict[str, str]) -> str | None:
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return plan.get(generic)


def _share(size: int, path: str, group: Group) -> slice:
    if size % group.size:
        raise ConfigError(
            f"tensor_parallel.tp_size is {group.size}, "
            f"which does not divide the {size} features of {path}"
        )
    part = size // group.size
    return slice(group.rank * part, (group.rank + 1) * part)


def _split_per_head(path: str, whole: nn.Parameter, root: nn.Module, group: Group) -> None:
    owner, _, name = path.rpartition(".")
    part = whole[_share(len(whole), path, group)].detach().clone()
    setattr(root.get_submodule(owner), name, nn.Parameter(part, requires_grad=False))


def _split_columns(path: str, layer: nn.Linear, group: Group) -> None:
    rows = _share(layer.out_features, path, group)
    layer.weight = nn.Parameter(layer.weight[rows].detach().clone(), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows].detach().clone(), requires_grad=False)
    layer.out_features = layer.weight.shape[0]


def _split_rows(path: str, layer: nn.Linear, sums: RowSums) -> None:
    columns = _share(layer.in_features, path, sums.group)
    layer.weight = nn.Parameter(layer.weight[:, columns].detach().clone(), requires_grad=False)
    layer.in_features = layer.weight.shape[1]
    bias = layer.bias
    layer.register_parameter("bias", None)  # it is added once, after the sum

    def sum_up(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        out = sums.add(out)
        return out if bias is None else out + bias

    layer.register_forward_hook(sum_up)
