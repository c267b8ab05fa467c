"""Dense attention by the fastest operator present: causal squares and full rectangles only.

What differs between packages ends here: names, signatures, layouts, and what lse looks like. Only
squares are asked with a causal mask, since where T != S some align it at the start and others at
the end. Windows are never asked: flash-attn drops a side that is as long as the keys. Whether an
operator is right, its lse and base included, is tried on the device for the very head dims that
will be asked for; a package that is newer, broken or wrong is passed over with a line.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ds_cp.attention.spec import LayerSpec
from ds_cp.errors import is_out_of_memory

# q [T, H, D], k and v [S, G, D], any strides but a dense last dimension; scale; causal (then T is
# S) -> out [T, H, D] in q's dtype, natural-log lse [T, H] fp32.
Dense = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]
]

MAX_DIM, DIM_STEP = 256, 8  # dims: largest head_dim, and what it must be a multiple of
LIMIT = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest value; lse in fp32
TRIAL = ((150, 150, True), (37, 150, False), (1, 3, False), (128, 128, True))  # T, S, causal


class DenseError(Exception):
    """An operator cannot be used; the message is the reason, as the end of a sentence."""


class NotInstalledError(DenseError):
    """The package is not there, which is nothing to report."""


@dataclass(frozen=True)
class Candidate:
    """An operator by name, and how to get it; ``load`` raises ``DenseError``."""

    name: str
    load: Callable[[], Dense]


def candidates(device: torch.device) -> tuple[Candidate, ...]:
    """All operators for ``device``, the fastest first. A fixed order, not a trial of speed: which
    one serves must not differ from start to start, nor from rank to rank. cuDNN is last of torch's:
    it builds a plan for each new length, and chunks have ever new ones."""
    if device.type != "cuda":
        return ()
    fa2 = Candidate("flash-attn 2", load_fa2)
    fa3 = Candidate("flash-attn 3", load_fa3)
    fa4 = Candidate("flash-attn 4", load_fa4)
    cudnn = (
        Candidate("cuDNN", lambda: cudnn_dense),
        Candidate("cuDNN over expanded heads", lambda: expanded(cudnn_dense)),
    )
    torch_flash = (
        Candidate("torch's flash operator", lambda: torch_flash_dense),
        Candidate(
            "torch's flash operator over expanded heads", lambda: expanded(torch_flash_dense)
        ),
    )
    major = torch.cuda.get_device_capability(device)[0]
    if major >= 10:  # flash-attn 3 is for Hopper alone
        return fa4, fa2, *torch_flash, *cudnn
    if major == 9:
        return fa3, fa4, fa2, *torch_flash, *cudnn
    return fa2, *torch_flash, *cudnn, fa4


@dataclass(frozen=True)
class Found:
    """The first operator that is right, if any, and a line on each one before it that is there and
    was passed over."""

    name: str
    dense: Dense | None
    notes: tuple[str, ...]


def refusal(spec: LayerSpec, dtype: torch.dtype) -> str:
    """Why no operator here serves such a layer, as the end of a sentence; "" when one may."""
    if dtype not in LIMIT:
        return f"dense operators have no {dtype}"
    if spec.v_dim != spec.head_dim:
        return f"head dims {spec.head_dim} and {spec.v_dim} differ"
    if spec.head_dim % DIM_STEP or spec.head_dim > MAX_DIM:
        return f"head_dim {spec.head_dim} is no multiple of {DIM_STEP} up to {MAX_DIM}"
    if spec.softcap is not None:
        return "not every operator has a soft cap"
    return ""


def first_right(
    choices: Sequence[Candidate], spec: LayerSpec, dtype: torch.dtype, device: torch.device
) -> Found:
    """The first of ``choices`` that loads and is right for ``spec``'s head counts and dims."""
    if refusal(spec, dtype):
        return Found("", None, ())
    notes: list[str] = []
    for choice in choices:
        try:
            dense = choice.load()
            problem = fault(dense, spec, dtype, device)
        except NotInstalledError:
            continue
        except DenseError as err:
            problem = str(err)
        if not problem:
            return Found(choice.name, dense, tuple(notes))
        notes.append(f"{choice.name} is not used: {problem}")
    return Found("", None, tuple(notes))


def fault(dense: Dense, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str:
    """What the operator gets wrong on the device, as the end of a sentence; "" when nothing."""
    gen = torch.Generator().manual_seed(3)
    for rows, keys, causal in TRIAL:
        # Heads first in memory, as layers leave them.
        q, k, v = (
            torch.randn(heads, n, spec.head_dim, generator=gen).to(device, dtype).transpose(0, 1)
            for heads, n in (
                (spec.num_q_heads, rows), (spec.num_kv_heads, keys), (spec.num_kv_heads, keys)
            )
        )  # fmt: skip
        try:
            out, lse = dense(q, k, v, spec.scale, causal)
            error = _error(out, lse, q, k, v, spec.scale, causal)
        except Exception as err:  # whatever a foreign package raises, it is not taken
            if is_out_of_memory(err):
                raise
            first = (str(err).strip() or type(err).__name__).splitlines()[0]
            return f"it fails here: {first}"
        if not error <= LIMIT[dtype]:
            kind = "causal" if causal else "full"
            return f"it is wrong by {error:.1e} for {rows} rows over {keys} keys, {kind}"
    return ""


def _error(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
) -> float:
    fold = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(fold, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), wide_k) * scale
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    want = torch.einsum("hts,shd->thd", torch.softmax(scores, dim=-1), wide_v)
    want_lse = torch.logsumexp(scores, dim=-1).transpose(0, 1)
    if out.shape != want.shape or lse.shape != want_lse.shape or lse.dtype != torch.float32:
        return float("inf")
    wrong = (out.double() - want).abs().amax() / want.abs().amax()
    wrong_lse = (lse.double() - want_lse).abs().amax() / want_lse.abs().amax().clamp_min(1.0)
    return float(torch.maximum(wrong, wrong_lse))


# --- packages


def load_fa2() -> Dense:
    """flash-attn 2: ``flash_attn.flash_attn_func``."""
    module = _module("flash_attn")
    if getattr(module, "__file__", None) is None:  # the folder that flash-attn 4 shares
        raise NotInstalledError
    return from_package(_function(module))


def load_fa3() -> Dense:
    """flash-attn 3: ``flash_attn_interface``, or where its wheel puts that."""
    try:
        module = _module("flash_attn_interface")
    except NotInstalledError:
        module = _module("flash_attn_3.flash_attn_interface")
    return from_package(_function(module))


def load_fa4() -> Dense:
    """flash-attn 4: ``flash_attn.cute``."""
    return from_package(_function(_module("flash_attn.cute")))


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name is not None and (name == err.name or name.startswith(err.name + ".")):
            raise NotInstalledError from err
        raise DenseError(f"it does not load: {err}") from err
    except Exception as err:  # an undefined symbol, another CUDA, an assertion: all are reasons
        first = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DenseError(f"it does not load: {first}") from err


def _function(module: ModuleType) -> Callable[..., Any]:
    function = getattr(module, "flash_attn_func", None)
    if not callable(function):
        raise DenseError(f"{module.__name__} has no flash_attn_func")
    return function  # type: ignore[no-any-return]


def from_package(function: Callable[..., Any]) -> Dense:
    """A ``flash_attn_func``, which takes ``[B, T, H, D]`` and gives lse ``[B, H, T]``.

    What asks for the lse is called return_attn_probs in flash-attn 2 and in 3 since August 2025,
    and return_lse in 4; before, 3 and 4 had no such argument and always gave it.
    """
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError) as err:
        raise DenseError(f"flash_attn_func has no signature: {err}") from err
    if missing := [name for name in ("softmax_scale", "causal") if name not in known]:
        raise DenseError(f"flash_attn_func has no argument {', '.join(missing)}")
    ask = {name: True for name in ("return_lse", "return_attn_probs") if name in known}
    if len(ask) == 2:
        del ask["return_attn_probs"]

    def dense(
        q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.unsqueeze(0) for x in (q_THD, k_SGD, v_SGD))
        found = function(q, k, v, softmax_scale=scale, causal=causal, **ask)
        if not isinstance(found, tuple) or len(found) < 2 or found[1] is None:
            raise DenseError("flash_attn_func gives no lse")
        return found[0][0], _lse_by_row(found[1], len(q_THD))

    return dense


# --- torch's operators


def cudnn_dense(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN through torch; its lse may have a last dimension of one."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q_THD, k_SGD, v_SGD), None, True, 0.0, causal, False, scale=scale
    )
    return found[0][0].transpose(0, 1), _lse_by_row(found[1], len(q_THD))


def torch_flash_dense(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """flash-attn 2 as torch carries it; its lse may be padded."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        *_heads_first(q_THD, k_SGD, v_SGD), 0.0, causal, False, scale=scale
    )
    return found[0][0].transpose(0, 1), _lse_by_row(found[1], len(q_THD))


def expanded(dense: Dense) -> Dense:
    """``dense`` for an operator that wants as many KV heads as query heads."""

    def over_copies(
        q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fold = q_THD.shape[1] // k_SGD.shape[1]
        k, v = (x.repeat_interleave(fold, dim=1) for x in (k_SGD, v_SGD))
        return dense(q_THD, k, v, scale, causal)

    return over_copies


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]


def _lse_by_row(lse: torch.Tensor, rows: int) -> torch.Tensor:
    """``[1, H, T]``, with or without padding and a last dimension of one, as ``[T, H]``."""
    if lse.dim() == 4:
        lse = lse.squeeze(-1)
    return lse[0, :, :rows].transpose(0, 1)
