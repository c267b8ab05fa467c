"""The check at start that what is served equals what transformers computes, on a few tokens.

The reference is transformers alone on the whole model, before it is sharded, called as its own
``generate`` calls it. Ours goes through the real step, KV pool and kernel: a prompt in two chunks
beside a shorter prompt, then one decode step of both, with blocks out of order. In 16 bits a second
run compares layer by layer (see ``layerwise``).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ds_cp.attention import LayerSpec, PagedKernel
from ds_cp.comm.wire import Group
from ds_cp.errors import UnsupportedModelError
from ds_cp.kv.pool import KVPool
from ds_cp.model.faults import decoder_at_fault
from ds_cp.model.shard import RowSums
from ds_cp.model.wiring import CONTEXT, Decoder
from ds_cp.plan import Begin, Chunk, Decodes, Sampling, StepPlan
from ds_cp.startup.layerwise import AttentionRecord
from ds_cp.worker.state import WorkerState
from ds_cp.worker.step_context import Layers, StepContext

FIRST, SECOND = 10, 7  # tokens of the two chunks of the long prompt
SHORT = 6  # tokens of the short prompt; it begins as the long one does
LENGTH = FIRST + SECOND + 1  # tokens of the reference: both chunks and one decoded token
STEPS = (FIRST + SHORT, SECOND, 2)  # tokens of each of our forward calls
OWN = "transformers' sdpa"  # the step in a record that is not ours, but transformers' own
BLOCK = 8  # tokens of a block of KV in the check
BLOCKS_OF_LONG, BLOCKS_OF_SHORT = (3, 0, 2), (1,)

FLOOR_FP32 = 1e-4  # least limit of the error, as a share of the largest logit
FLOOR_HALF = 5e-2  # the same for bf16 and fp16, also of one layer's attention
ROUNDING = 3.0  # times transformers' own difference between two of its kernels
CEILING = 0.45  # largest limit of the error: logits of unrelated tokens differ by 0.6 and more


@dataclass(frozen=True)
class Reference:
    """``logits``: fp32 ``[LENGTH, V]`` of transformers' eager attention; ``rounding``: the relative
    difference of its sdpa attention to them; ``record``: its attention layer by layer, in 16 bits
    and where its modules can be followed."""

    logits: torch.Tensor
    rounding: float
    record: AttentionRecord | None = None


@dataclass(frozen=True)
class Step:
    """Our logits of one step, fp32 ``[T, V]``, at ``positions`` of the prompt."""

    name: str
    positions: tuple[int, ...]
    logits: torch.Tensor


def reference_logits(model: Decoder, modules: Sequence[nn.Module]) -> Reference:
    """What transformers alone computes with the whole ``model``; local to this rank. ``modules``:
    the attention modules by layer."""
    ids = torch.tensor([_tokens(model)], device=model.device)
    inputs = {"input_ids": ids, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:  # as ``generate`` does
        inputs["position_ids"] = torch.arange(LENGTH, device=model.device)[None]
    record = AttentionRecord(modules, LENGTH)
    rounding = 0.0
    at_fault = decoder_at_fault(model, "does not run in transformers")
    with torch.inference_mode(), at_fault:
        model.set_attn_implementation("eager")
        with record.recording():
            logits = model(**inputs).logits[0].float()
        layerwise = model.dtype != torch.float32 and record.complete
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:  # the architecture has no such attention
            return Reference(logits, rounding, record if layerwise else None)
        rounding = relative_error(model(**inputs).logits[0].float(), logits)
        if layerwise:
            with record.replaying(OWN, range(LENGTH)):
                model(**inputs)
    return Reference(logits, rounding, record if layerwise else None)


def served_logits(
    model: Decoder,
    layers: Sequence[LayerSpec],
    kernel: PagedKernel,
    cp: Group,
    sums: RowSums,
    record: AttentionRecord | None = None,
) -> list[Step]:
    """Our logits of the same tokens, step by step, in a small KV pool of its own.

    Every rank runs requests of its own, so that only tensor-parallel sums are exchanged; these are
    carried out even if this rank fails. With a ``record`` every layer's attention gets the
    reference's inputs; its errors are then in the record, and logits show everything else.
    """
    with sums.expected(STEPS), torch.inference_mode():
        pool = KVPool(layers, 4, BLOCK, model.dtype, cp.device, kernel.packed)
        shared = Layers(layers, pool, kernel, cp)
        state = WorkerState(cp.rank, BLOCK)
        steps = []
        for name, plan in _plans(cp.rank, _tokens(model)):
            step = StepContext(state.apply(plan), shared)
            with record.replaying(name, step.row_positions) if record else nullcontext():
                out = model(
                    input_ids=step.ids, position_ids=step.positions, use_cache=False,
                    **{CONTEXT: step},
                )  # fmt: skip
            steps.append(Step(name, tuple(step.row_positions), out.logits[0].float()))
        return steps


def compare(
    name: str,
    dtype: torch.dtype,
    reference: Reference,
    steps: Sequence[Step],
    replayed: Sequence[Step] = (),
) -> float:
    """The largest relative difference of our logits to transformers' own.

    Where ``replayed`` steps compared layer by layer, these are judged, else the logits. Raises
    ``UnsupportedModelError``, naming the architecture and the place, when it is not rounding: the
    model does something that ds_cp does not see, or the kernel is wrong on this device.
    """
    floor = FLOOR_FP32 if dtype == torch.float32 else FLOOR_HALF

    def limit(rounding: float) -> float:
        return max(floor, min(ROUNDING * rounding, CEILING))

    if reference.record is not None:
        errors = reference.record.errors
        for (step, layer), error in errors.items():
            if step != OWN:
                most = limit(errors.get((OWN, layer), 0.0))
                _judge(error, most, f"{name}: attention of layer {layer} in the {step} differs")
    excused = 0.0 if replayed else reference.rounding
    for one in replayed or steps:
        what = f"{name}: logits of the {one.name} differ"
        _judge(_error_of(one, reference), limit(excused), what)
    return max(_error_of(step, reference) for step in steps)


def _error_of(step: Step, reference: Reference) -> float:
    return relative_error(step.logits, reference.logits[list(step.positions)])


def _judge(error: float, limit: float, what: str) -> None:
    if not error <= limit:  # also when it is not a number
        raise UnsupportedModelError(
            f"{what} from transformers' own by {error:.1e} of the scale (limit {limit:.1e}): "
            "the model's attention or positions do something that ds_cp does not see, "
            "or attention.backend is wrong on this device; try another backend or model"
        )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference as a share of the largest value of ``want``."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))


def _tokens(model: Decoder) -> list[int]:
    vocab: int = model.config.get_text_config().vocab_size
    return [n * 7919 % vocab for n in range(1, LENGTH + 1)]


def _plans(rank: int, tokens: Sequence[int]) -> list[tuple[str, StepPlan]]:
    """The three steps, each with its name, with everything on ``rank``."""

    def begin(request: int, length: int) -> Begin:
        return Begin(request, tuple(tokens[:length]), length, (), 0, Sampling(temperature=0.0))

    def chunk(request: int, start: int, count: int, blocks: Sequence[int]) -> Chunk:
        homes = tuple((rank, block) for block in blocks)
        last = start + count == (LENGTH if request == 1 else SHORT + 1) - 1
        return Chunk(request, "local", "kv", ((rank, ((start, count),)),), homes, last)

    first = StepPlan(
        0,
        begins=(begin(1, LENGTH), begin(2, SHORT + 1)),
        chunks=(chunk(1, 0, FIRST, BLOCKS_OF_LONG[:2]), chunk(2, 0, SHORT, BLOCKS_OF_SHORT)),
    )  # fmt: skip
    second = StepPlan(1, chunks=(chunk(1, FIRST, SECOND, BLOCKS_OF_LONG[2:]),))
    third = StepPlan(2, decodes=(Decodes("local", "kv", (1, 2)),))
    return [("first chunk", first), ("second chunk", second), ("decode step", third)]
