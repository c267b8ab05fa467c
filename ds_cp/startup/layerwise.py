"""Each layer's attention compared with the same inputs, so that rounding does not accumulate.

In 16 bits, rounding in one layer sends a token of a mixture of experts to other experts in the
next, and logits of two right kernels differ by as much as a third of their scale. So the
reference's inputs and outputs of each attention module are recorded; ours is given the same inputs,
and what it returns is compared and then replaced by the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class AttentionRecord:
    """Inputs and outputs of every layer's attention module over one sequence of T tokens."""

    def __init__(self, modules: Sequence[nn.Module], num_tokens: int) -> None:
        self._modules = list(modules)
        self._num_tokens = num_tokens
        self._inputs: dict[int, torch.Tensor] = {}  # by layer, [T, hidden size]
        self._outputs: dict[int, torch.Tensor] = {}
        self.errors: dict[tuple[str, int], float] = {}  # by step and layer, largest relative one

    @property
    def complete(self) -> bool:
        """Whether every module was called as expected: hidden states ``[1, T, ..]`` in and out."""
        layers = range(len(self._modules))
        return all(layer in self._inputs and layer in self._outputs for layer in layers)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within: one forward call of the whole sequence by transformers' own attention."""

        def before(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(self._inputs, layer, _hidden(args, kwargs))

        def after(layer: int, out: Any) -> None:
            self._keep(self._outputs, layer, _first(out))

        with self._hooked(before, after):
            yield

    @contextmanager
    def replaying(self, step: str, positions: Sequence[int]) -> Iterator[None]:
        """Within: one forward call, ``step``, of the tokens at ``positions`` by our attention."""
        rows = list(positions)

        def before(
            layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = self._inputs[layer][rows].unsqueeze(0)
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": given}
            return (given, *args[1:]), kwargs

        def after(layer: int, out: Any) -> Any:
            whole = self._outputs[layer]
            want, got = whole[rows].unsqueeze(0), _first(out)
            scale = whole.float().abs().max().clamp_min(1e-6)
            error = (got.float() - want.float()).abs().max() / scale
            self.errors[step, layer] = float(error)
            return (want, *out[1:]) if isinstance(out, tuple) else want

        with self._hooked(before, after):
            yield

    def _keep(self, where: dict[int, torch.Tensor], layer: int, x: Any) -> None:
        if isinstance(x, torch.Tensor) and x.shape[:2] == (1, self._num_tokens):
            where[layer] = x[0].detach().clone()

    @contextmanager
    def _hooked(self, before: Any, after: Any) -> Iterator[None]:
        handles = []
        for layer, module in enumerate(self._modules):

            def enter(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> Any:
                return before(layer, args, kwargs)

            def leave(_: nn.Module, __: Any, out: Any, layer: int = layer) -> Any:
                return after(layer, out)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("hidden_states", args[0] if args else None)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
