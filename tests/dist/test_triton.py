"""The Triton kernels: interpreted on this CPU against fp64, compiled for two generations of
devices, and, under the ``gpu`` marker, the same cases on a device.

Triton asks once, when it is imported, whether to interpret: those cases run in processes of their
own (tests/helpers/triton_cases.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.attention import LayerSpec
from ds_cp.attention.batch import Blocks, Part, make_batch
from ds_cp.attention.kernels.choose import KernelUnavailableError
from ds_cp.attention.pages import PageShape
from ds_cp.layout import Runs, positions

pytest.importorskip("triton", reason="triton is not installed: pip install 'ds_cp[cuda]'")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.compiler import compile as triton_compile  # noqa: E402

from ds_cp.attention.kernels import triton_decode, triton_merge, triton_prefill  # noqa: E402
from ds_cp.attention.kernels.triton_kernel import TritonKernel, make_triton  # noqa: E402
from ds_cp.attention.kernels.triton_tables import Tile, prefill_tile  # noqa: E402
from ds_cp.model import triton_linear, triton_norm  # noqa: E402
from tests.helpers import triton_cases  # noqa: E402

pytestmark = pytest.mark.cpu_only("interpreted kernels; has tests of its own marked gpu")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = (
    triton_decode.plan_kernel, triton_decode.split_kernel, triton_decode.merge_kernel,
    triton_prefill.prefill_kernel, triton_merge.fold_kernel, triton_merge.write_kernel,
)  # fmt: skip
STEP_VECTORS = {  # slices of a step's upload: their alignment and length differ every step
    "q_positions", "q_starts", "block_starts", "blocks", "firsts", "keys", "bases", "tasks",
    "places", "rows", "count", "max_tasks", "max_rows", "num_rows", "tokens", "width", "window",
}  # fmt: skip
WIRE_VIEWS = {  # of the merge: rows of what arrived, and of a running partial
    "out", "lse", "more", "more_lse", "more_n", "more_t", "more_h", "more_lse_n", "more_lse_t",
    "more_lse_h",
}  # fmt: skip


def test_steps_by_the_triton_kernels() -> None:
    """Captured decode steps over static buffers, by the kernels themselves."""
    code = "from tests.unit.worker import test_decode_graph as t; t.interpreted()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "[(1, 2048), (2, 2048), (4, 2048)]".split()


@pytest.mark.parametrize("group", triton_cases.GROUPS)
def test_interpreted_kernels_equal_fp64(group: str) -> None:
    """Prompts, decodes, splits, windows, caps, dtypes, head dims and counts, far keys, sparse
    blocks; merges, writes, pools beyond 2^31 elements; a request's bits whatever its company."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.triton_cases", group],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("ok ") == len(triton_cases.GROUPS[group])


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, int]:
    """Queries and blocks anywhere, sparse or not, and the blocks' size."""
    size = draw(st.sampled_from([4, 16, 64]))
    at, blocks = draw(st.integers(0, 3 * size)), Blocks()
    for number in range(draw(st.integers(1, 12))):
        keys = draw(st.one_of(st.just(size), st.integers(1, size)))
        blocks.append(number, at, keys)
        at += size * draw(st.sampled_from([1, 1, 1, 3])) if keys == size else keys
    runs: list[tuple[int, int]] = []
    row = draw(st.integers(0, 40))
    for _ in range(draw(st.integers(1, 3))):
        runs.append((row, draw(st.integers(1, 60))))
        row += runs[-1][1] + draw(st.integers(0, 30))
    return Part(tuple(runs), blocks), size


@settings(max_examples=60)
@given(
    parts(), st.integers(1, 5), st.sampled_from([16, 32]), st.sampled_from([16, 64]),
    st.one_of(st.none(), st.integers(1, 90)),
)  # fmt: skip
def test_planned_tiles_cover_what_is_seen(
    some: tuple[Part, int], heads: int, rows: int, keys: int, window: int | None
) -> None:
    """Every visible pair is within its tile's keys; every pair before the first masked key is
    visible or no key; nothing else is planned than what some row of the tile can be near to."""
    part, size = some
    at = positions(part.q_runs)
    batch, tile = make_batch((part,), torch.device("cpu")), Tile(rows, keys, 4, 2)
    with mock.patch.object(triton_prefill, "is_few", lambda rows, heads: False):
        plan = triton_prefill.plan_prefill(batch, heads, tile, size, window)
    planned = {} if plan is None else {t[1]: t[2:6] for t in plan.tiles.tolist()}
    assert plan is None or plan.num_tiles == len(planned) <= -(-len(at) * heads // rows)
    for first in range(0, len(at) * heads, rows):
        tokens = {r // heads for r in range(first, min(first + rows, len(at) * heads))}
        lead, begin, masked, end = planned.get(first, (0, 0, 0, 0))
        assert begin % keys == masked % keys == 0 <= begin <= masked
        for entry, block in enumerate(part.blocks):
            for j in range(block.keys):
                u, key = (lead + entry) * size + j, block.first + j
                seen = [key <= at[t] and (not window or key > at[t] - window) for t in tokens]
                assert begin <= u < end or not any(seen)
                assert u >= masked or u < begin or all(seen)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_nothing_is_compiled_anew_for_a_step(kernel: Any) -> None:
    """What changes from step to step is no part of what Triton compiles for."""
    for param in kernel.params:
        views = WIRE_VIEWS if kernel is triton_merge.fold_kernel else set()
        if param.name in STEP_VECTORS | views:
            assert param.do_not_specialize or param.do_not_specialize_on_alignment, param.name


def test_its_decodes_can_be_captured_unless_tiles_are_planned_for_them() -> None:
    assert TritonKernel().capturable and not TritonKernel(deterministic=True).capturable


TYPES = {
    "q": "*bf16", "pages": "*bf16", "k": "*bf16", "v": "*bf16", "more": "*bf16",
    "tasks": "*i32", "bases": "*i32", "tiles": "*i32", "scale": "fp32", "cap": "fp32",
    "out": "*fp32", "lse": "*fp32", "part_out": "*fp32", "part_lse": "*fp32", "more_lse": "*fp32",
    "q_positions": "*i64", "blocks": "*i64", "firsts": "*i64", "keys": "*i64", "q_starts": "*i64",
    "block_starts": "*i64", "places": "*i64", "rows": "*i64",
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "capability"), [
    (KERNELS[0], 90), (KERNELS[1], 80), (KERNELS[2], 80), (KERNELS[3], 90), (KERNELS[4], 90),
    (KERNELS[5], 80),
], ids=lambda value: getattr(value, "__name__", str(value)))  # fmt: skip
def test_kernels_compile_without_a_device(
    kernel: Any, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code for sm_80 or sm_90, within the shared memory of consumer cards, with matrix
    instructions, and with pages read 16 bytes at a time, ahead of their use."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = Tile(64, 32, 4, 2) if kernel is KERNELS[3] else Tile(16, 32, 4, 3)
    known = {
        "FOLD": 4, "SPLIT": 512, "LANES": 128, "CHUNK": 32, "M": tile.rows, "FIELDS": 8, "R": 16,
        "T": 64, "INTO": True, "INDEXED": True, "B": 16, "D": 48, "DV": 64, "BD": 64, "BDV": 64,
        "BN": tile.keys, "WINDOW": True, "CAP": True, "UPCAST": False,
    }  # fmt: skip
    constants = {p.name: known[p.name] for p in kernel.params if p.is_constexpr}
    types = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, param in enumerate(kernel.params)
        if not param.is_constexpr and TYPES.get(param.name, "i32") != "fp32"
        if not param.do_not_specialize and not param.do_not_specialize_on_alignment
    }
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton_compile(source, GPUTarget("cuda", capability, 32), tile.launch)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 100 * 1024
    ptx = compiled.asm["ptx"]
    if kernel in (KERNELS[1], KERNELS[3]):
        assert "mma.sync" in ptx or "wgmma.mma_async" in ptx
        assert "cp.async.cg.shared.global" in ptx


LAYERS = [
    (triton_linear.linear_kernel, bits, {"BIAS": True, "M": 32, "N": 64, "K": 128 // size,
                                         "UPCAST": False}, 4)
    for bits, size in (("bf16", 2), ("fp32", 4))
] + [(triton_norm.norm_kernel, "bf16", {"ROUND": True, "N": 2048}, 1)]  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
def test_layers_compile_without_a_device(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic linear layers and norms: the former with matrix instructions for 16 bits, and
    with weights that are read ahead of their use. No number of rows compiles them anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, bits, constants, stages in LAYERS:
        kinds = {name: f"*{bits}" for name in ("x", "weight", "bias", "y")}
        if kernel is triton_norm.norm_kernel:
            kinds |= {"weight": "*fp32", "eps": "fp32"}
        types = {n: "constexpr" if n in constants else kinds.get(n, "i32")
                 for n in kernel.arg_names}  # fmt: skip
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, param in enumerate(kernel.params)
            if types[param.name] not in ("constexpr", "fp32") and not param.do_not_specialize
        }
        source = ASTSource(kernel, types, constants, aligned)
        launch = {"num_warps": 4, "num_stages": stages}
        compiled = triton_compile(source, GPUTarget("cuda", capability, 32), launch)
        assert compiled.metadata.shared < 100 * 1024
        if kernel is triton_linear.linear_kernel:
            ptx = compiled.asm["ptx"]
            assert "cp.async.cg.shared.global" in ptx
            assert ("mma.sync" in ptx or "wgmma" in ptx) == (bits == "bf16")
            assert next(p for p in kernel.params if p.name == "num_rows").do_not_specialize


def test_refuses_by_name() -> None:
    """What it cannot do is said, not computed."""
    kernel, layer = TritonKernel(), LayerSpec(8, 2, 64, 0.1)
    for size in (1, 16, 32, 256):
        assert kernel.refuses(layer, size, torch.bfloat16) == ""
    assert "block_size 48" in kernel.refuses(layer, 48, torch.bfloat16)
    assert "float64" in kernel.refuses(layer, 16, torch.float64)
    assert "576" in kernel.refuses(LayerSpec(8, 1, 576, 0.1), 16, torch.bfloat16)
    assert "512" in kernel.refuses(LayerSpec(8, 1, 64, 0.1, v_head_dim=512), 16, torch.bfloat16)
    with pytest.raises(KernelUnavailableError, match="CUDA device"):
        make_triton(torch.device("cpu"), torch.bfloat16)


def test_every_shape_has_a_tile() -> None:
    """Whatever is not refused is in the table."""
    for dim in range(1, 257):
        for dtype in (torch.float16, torch.float32):
            shape = PageShape(16, 1, dim, 257 - dim, dtype)
            assert triton_decode.decode_tile(shape, 16).rows == 16 <= prefill_tile(shape).rows


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "name"), [(g, name) for g, checks in triton_cases.GROUPS.items() for name in checks]
)
def test_compiled_kernels_equal_fp64(group: str, name: str) -> None:
    triton_cases.GROUPS[group][name](torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (192, 128), (128, 128), (256, 256)])
def test_passes_the_self_test_on_a_device(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    from ds_cp.attention.kernels.self_test import fault

    layer = LayerSpec(8, 2, dims[0], dims[0] ** -0.5, v_head_dim=dims[1])
    device = torch.device("cuda")
    assert fault(make_triton(device, dtype), [layer], 16, dtype, device) == ""


@pytest.mark.gpu
def test_a_decode_step_is_captured_without_waiting() -> None:
    """No host sync, and a graph made with one step's vectors serves another's."""
    device = torch.device("cuda")
    asked = triton_cases.Asked(tuple(triton_cases.decode(n) for n in (700, 40, 1300)), (8, 2))
    built = triton_cases.build(asked, device)
    kernel = TritonKernel()
    want = triton_cases.run(asked, built, None)

    def step(batch: Any) -> Any:
        return kernel.paged_attention(built.q, built.q_positions, built.pages, batch, asked.spec)

    batch = make_batch(built.parts, device, 3)
    step(batch)  # compiles
    batch.derived.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batch.derived.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(batch)
    graph.replay()
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
    earlier = [
        Part(_earlier(part.q_runs), part.blocks.within(0, part.blocks.num_keys - 30))
        for part in built.parts
    ]
    shorter = make_batch(earlier, device, 3)
    for name in ("block_starts", "blocks", "firsts", "keys"):
        new = getattr(shorter, name)
        getattr(batch, name)[: len(new)] = new
    built.q_positions[3:6] -= 30
    graph.replay()
    again = kernel.paged_attention(built.q, built.q_positions, built.pages, shorter, asked.spec)
    assert torch.equal(got.out, again.out) and torch.equal(got.lse, again.lse)


def _earlier(runs: Runs) -> Runs:
    return tuple((start - 30, length) for start, length in runs)
