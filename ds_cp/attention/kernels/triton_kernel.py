"""The Triton kernels as one ``PagedKernel``, over plain pages on CUDA."""

from __future__ import annotations

import torch
import triton

from ds_cp.attention.batch import PagedBatch
from ds_cp.attention.kernels import triton_merge
from ds_cp.attention.kernels.by_torch import ByTorch
from ds_cp.attention.kernels.choose import KernelUnavailableError
from ds_cp.attention.kernels.triton_decode import DecodePlan, decode, plan_decode
from ds_cp.attention.kernels.triton_prefill import PrefillPlan, plan_prefill, prefill
from ds_cp.attention.kernels.triton_tables import MAX_DIM, Call, prefill_tile
from ds_cp.attention.pages import Pages, PageShape, empty_pages
from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import Partial, dense, empty_partial, merge_rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CAPABILITY = (8, 0)  # of the oldest device that its tiles are made for


class TritonKernel(ByTorch):
    """``PagedKernel`` by Triton: requests with few rows by split keys, the others by tiles of rows.
    Which of the two serves a request depends on that request and the layer alone. They differ by
    rounding; with ``deterministic`` all go by tiles, so that a row does not depend on how its
    prompt was cut into chunks either. Few rows over many keys then keep few programs busy."""

    name = "triton"
    packed = False
    stacks = True

    def __init__(self, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    @property
    def capturable(self) -> bool:
        """With few rows a request, a call looks at nothing on the host; by tiles their plan is made
        there."""
        return not self._deterministic

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        """Serves blocks of a power of two tokens, fp16, bf16 and fp32, head dims to ``MAX_DIM``."""
        if dtype not in DTYPES:
            return f"it has no {dtype}"
        if block_size & (block_size - 1):
            return f"block_size {block_size} is no power of two"
        if max(spec.head_dim, spec.v_dim) > MAX_DIM:
            return f"head_dim {max(spec.head_dim, spec.v_dim)} is more than {MAX_DIM}"
        return ""

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial | None = None,
    ) -> Partial:
        """As in ``PagedKernel``. What is planned once a step is kept in ``batch.derived``."""
        call, merge = Call(dense(q_THD), q_positions, pages, spec), into is not None
        if into is None:
            into = empty_partial(len(q_THD), spec.num_q_heads, spec.v_dim, q_THD.device)
        few = None if self._deterministic else _decode_plan(batch, spec)
        if few is not None:
            decode(call, batch, few, into, merge)
        many = _prefill_plan(batch, spec, pages.shape, every=self._deterministic)
        if many is not None:
            prefill(call, batch, many, into, merge)
        return into

    def write(
        self,
        pages: Pages,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        blocks: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """As in ``PagedKernel``."""
        triton_merge.write(pages, k_TGD, v_TGD, blocks, places)

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        """As in ``PagedKernel``; one partial or several stacked ones."""
        out, lse = part.out, part.lse
        if out.dim() == 3:
            out, lse = out.unsqueeze(0), lse.unsqueeze(0)
        if into.out.dtype is torch.float32 and into.out.stride(-1) == 1:
            triton_merge.merge_stacked(into, out, lse, rows)
            return
        for one, its_lse in zip(out, lse, strict=True):
            merge_rows(into, Partial(one, its_lse), rows)


def make_triton(
    device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> TritonKernel:
    """The kernel, once a first small launch in ``dtype`` compiled and ran. Raises
    ``KernelUnavailableError`` when the device is too old, has no such kernel, or Triton finds no C
    compiler for its launchers, or cannot compile."""
    if device.type != "cuda":
        raise KernelUnavailableError("it needs a CUDA device")
    have = torch.cuda.get_device_capability(device)
    if have < CAPABILITY:
        raise KernelUnavailableError(
            f"the device has compute capability {have[0]}.{have[1]}, not 8.0"
        )
    if dtype not in DTYPES:
        raise KernelUnavailableError(f"it has no {dtype}")
    kernel = TritonKernel(deterministic)
    pages = empty_pages(PageShape(16, 1, 16, 16, dtype), 1, device)
    one = torch.zeros(1, 1, 16, dtype=dtype, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        kernel.write(pages, one, one, zero, zero)
        torch.cuda.synchronize(device)
    except Exception as err:  # whatever its compiler, linker or driver says
        first = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise KernelUnavailableError(f"triton {triton.__version__} fails here: {first}") from err
    return kernel


def _decode_plan(batch: PagedBatch, spec: LayerSpec) -> DecodePlan | None:
    heads_per_kv = spec.num_q_heads // spec.num_kv_heads
    key = ("triton decode", heads_per_kv)
    if key not in batch.derived:
        batch.derived[key] = plan_decode(batch, heads_per_kv)
    plan = batch.derived[key]
    assert plan is None or isinstance(plan, DecodePlan)
    return plan


def _prefill_plan(
    batch: PagedBatch, spec: LayerSpec, shape: PageShape, every: bool
) -> PrefillPlan | None:
    heads_per_kv, tile = spec.num_q_heads // spec.num_kv_heads, prefill_tile(shape)
    key = ("triton prefill", heads_per_kv, tile, shape.block_size, spec.window, every)
    if key not in batch.derived:
        batch.derived[key] = plan_prefill(
            batch, heads_per_kv, tile, shape.block_size, spec.window, every
        )
    plan = batch.derived[key]
    assert plan is None or isinstance(plan, PrefillPlan)
    return plan
