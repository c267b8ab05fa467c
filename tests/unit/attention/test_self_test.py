"""The check of a kernel at start: what is right passes, and each way to be wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ds_cp.attention import LayerSpec, PagedKernel
from ds_cp.attention.batch import Blocks, PagedBatch, Part, make_batch
from ds_cp.attention.kernels import self_test
from ds_cp.attention.kernels.reference import ReferenceKernel
from ds_cp.attention.kernels.self_test import GROUPS, cases, fault, num_blocks
from ds_cp.attention.pages import Pages
from ds_cp.attention.state import Partial
from ds_cp.layout import Block, total
from tests.helpers.paged import kernels

CPU = torch.device("cpu")
LAYERS = [LayerSpec(4, 2, 16, 0.25), LayerSpec(4, 2, 24, 0.2, v_head_dim=16)]


@pytest.mark.parametrize("size", [1, 4, 16, 64, 100, 600])
def test_kernels_that_are_right(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if size not in (16, 64):  # where it takes long
        monkeypatch.setattr(self_test, "DEEP", 1300)
    for kernel in kernels().values():
        for dtype in (torch.float32, torch.bfloat16):
            if not kernel.refuses(LAYERS[0], size, dtype):
                assert fault(kernel, LAYERS[:1], size, dtype, CPU) == "", kernel.name


@pytest.mark.parametrize("size", [1, 4, 5, 16, 64, 100, 513, 4096])
def test_every_kind_of_call_is_a_case(size: int) -> None:
    """And no case names a block or a key that is not there."""
    found = {case.name: case for case in cases(size)}
    for case in found.values():
        for part in case.parts:
            firsts = list(part.blocks.firsts)
            assert firsts == sorted(firsts)
            for block in part.blocks:
                assert 0 <= block.number < num_blocks(size) and 1 <= block.keys <= size
                assert block.first % size == 0
    names = " | ".join(found)
    for kind in (
        "causal", "full", "decode rows", "no keys", "no rows", "window 1",
        "band with fewer keys than rows", "band with more keys than rows", "soft cap",
        "soft cap and window", "keys of the future", "two runs of rows", "prompt beside decodes",
    ):  # fmt: skip
        assert kind in names
    assert set(found["causal"].groups) == set(found["decode rows"].groups) == {1, 3, 8}
    few = found["band with fewer keys than rows"].parts[0]
    assert few.blocks.num_keys < total(few.q_runs) and few.blocks.num_keys > 0
    more = found["band with more keys than rows"].parts[0]
    assert more.blocks.num_keys > total(more.q_runs)
    assert set(GROUPS) == {1, 3, 8}


class Mutant(ReferenceKernel):
    """The reference with something done to what it is given or what it finds."""

    name = "mutant"

    def __init__(
        self,
        before: Callable[..., dict[str, Any]] = lambda **given: given,
        after: Callable[[Partial], Partial] = lambda found: found,
        ignores_into: bool = False,
    ) -> None:
        self._before, self._after, self._ignores_into = before, after, ignores_into

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        q_positions: torch.Tensor,
        pages: Pages,
        batch: PagedBatch,
        spec: LayerSpec,
        into: Partial | None = None,
    ) -> Partial:
        given = self._before(q=q_THD, at=q_positions, pages=pages, batch=batch, spec=spec)
        found = super().paged_attention(
            given["q"], given["at"], given["pages"], given["batch"], given["spec"]
        )
        found = self._after(found)
        if into is None or self._ignores_into:
            return found
        self.merge_rows(into, found, None)
        return into


def spec_with(**other: Any) -> Callable[..., dict[str, Any]]:
    return lambda **given: {**given, "spec": replace(given["spec"], **other)}


def wrong_scale(**given: Any) -> dict[str, Any]:
    return {**given, "spec": replace(given["spec"], scale=given["spec"].scale * 1.1)}


def parts_with(change: Callable[[Part], Part]) -> Callable[..., dict[str, Any]]:
    def changed(**given: Any) -> dict[str, Any]:
        batch = given["batch"]
        parts = [change(part) for part in batch.parts]
        return {**given, "batch": make_batch(parts, CPU, batch.first_row)}

    return changed


def top_left(**given: Any) -> dict[str, Any]:
    """Row i of a request sees its first i + 1 keys, as torch's CPU operator aligns the mask."""
    batch, at = given["batch"], given["at"].clone()
    row = batch.first_row
    for part in batch.parts:
        rows = total(part.q_runs)
        if rows > 1 and len(part.blocks):
            at[row : row + rows] = part.blocks.firsts[0] + torch.arange(rows)
        row += rows
    return {**given, "at": at}


def bottom_right_window(**given: Any) -> dict[str, Any]:
    """A window that is clamped to the keys that there are, as flash-attn does."""
    spec, batch = given["spec"], given["batch"]
    keys = min((p.blocks.num_keys for p in batch.parts if len(p.blocks)), default=0)
    if spec.window is None or len(batch.parts) > 1:
        return given
    return {**given, "spec": replace(spec, window=min(spec.window, max(keys, 1)))}


def future(**given: Any) -> dict[str, Any]:
    """Nothing is hidden because it is later."""
    spec = given["spec"]
    at = given["at"] + (0 if spec.window is not None else 10**6)
    return {**given, "at": at}


def next_key(**given: Any) -> dict[str, Any]:
    return {**given, "at": given["at"] + 1}


def whole_blocks(part: Part) -> Part:
    """Slots without a key count as keys."""
    size = max((block.keys for block in part.blocks), default=1)
    return Part(part.q_runs, Blocks(Block(b.number, b.first, size) for b in part.blocks))


def first_blocks_only(part: Part) -> Part:
    return Part(part.q_runs, part.blocks[:17])


def one_head_for_all(**given: Any) -> dict[str, Any]:
    """Query heads of the KV heads mixed up."""
    return {**given, "q": given["q"].flip(1)}


def lse_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Partial], Partial]:
    return lambda found: Partial(found.out, change(found.lse))


def out_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Partial], Partial]:
    return lambda found: Partial(change(found.out), found.lse)


def junk_where_empty(found: Partial) -> Partial:
    empty = torch.isneginf(found.lse).unsqueeze(-1)
    return Partial(torch.where(empty, 1.0, found.out), found.lse)


MUTANTS: dict[str, Mutant] = {
    "wrong scale": Mutant(wrong_scale),
    "top-left causal": Mutant(top_left),
    "dropped window": Mutant(spec_with(window=None)),
    "clamped window": Mutant(bottom_right_window),
    "dropped soft cap": Mutant(spec_with(softcap=None)),
    "future keys": Mutant(future),
    "one key too many": Mutant(next_key),
    "slots without a key": Mutant(parts_with(whole_blocks)),
    "heads mixed up": Mutant(one_head_for_all),
    "lse in log2": Mutant(after=lse_of(lambda lse: lse / 0.6931471805599453)),
    "-inf as 0": Mutant(after=lse_of(lambda lse: lse.masked_fill(torch.isneginf(lse), 0.0))),
    "+inf for -inf": Mutant(after=lse_of(lambda lse: lse.masked_fill(torch.isneginf(lse), 1e38))),
    "NaN": Mutant(after=out_of(lambda out: out.masked_fill(out > 0.5, torch.nan))),
    "values where nothing is seen": Mutant(after=junk_where_empty),
    "the denominator left out": Mutant(
        after=lambda found: Partial(found.out * torch.exp(found.lse).unsqueeze(-1), found.lse)
    ),
    "into ignored": Mutant(ignores_into=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name: str, dtype: torch.dtype) -> None:
    for size in (4, 64):
        text = fault(MUTANTS[name], LAYERS[1:], size, dtype, CPU)
        assert text.startswith("it is wrong by "), (name, size)
        assert "head_dim 24" in text and "query heads per KV head" in text and "\n" not in text


def test_keys_beyond_the_first_read_are_there() -> None:
    text = fault(Mutant(parts_with(first_blocks_only)), LAYERS, 16, torch.float32, CPU)
    assert "decode rows" in text


def without(low: int, high: int, several: bool) -> Callable[[Part], Part]:
    """Keys of these positions are left out, of requests with several rows or of those with one."""

    def change(part: Part) -> Part:
        if (total(part.q_runs) > 1) != several:
            return part
        kept = (block for block in part.blocks if not low <= block.first < high)
        return Part(part.q_runs, Blocks(kept))

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "low", "high", "several"),
    [
        (8, 48, 10**9, True), (16, 48, 10**9, True), (64, 192, 10**9, True),
        (32, 128, 10**9, True),
        (16, 512, 1024, True), (16, 2048, 2560, True),  # a tile of a later chunk
        (16, 512, 1024, False), (16, 2048, 4096, False),  # a split
        (16, 32 * 512, 10**9, False), (64, 32 * 512, 10**9, False),  # the second round of merges
    ],
)  # fmt: skip
def test_every_stretch_of_keys_counts(
    size: int, low: int, high: int, several: bool, dtype: torch.dtype
) -> None:
    mutant = Mutant(parts_with(without(low, high, several)))
    assert fault(mutant, LAYERS[:1], size, dtype, CPU).startswith("it is wrong by ")


class OnlyRight(ReferenceKernel):
    """Right but with so many query heads per KV head."""

    name = "mutant"

    def __init__(self, wrong: int) -> None:
        self._wrong = wrong

    def paged_attention(self, q: Any, at: Any, pages: Any, batch: Any, spec: Any, into: Any = None):  # type: ignore[no-untyped-def]
        off = spec.num_q_heads // spec.num_kv_heads == self._wrong
        return super().paged_attention(q * 2 if off else q, at, pages, batch, spec, into)


def test_the_models_own_heads_are_checked() -> None:
    for heads, own in (((10, 2), 5), ((7, 1), 7)):
        layers = [LayerSpec(2, 2, 16, 0.25), LayerSpec(*heads, 16, 0.25)]
        text = fault(OnlyRight(own), layers, 16, torch.float32, CPU)
        assert f"{own} query heads per KV head" in text
        assert fault(OnlyRight(own), layers[:1], 16, torch.float32, CPU) == ""


class WrongWrite(ReferenceKernel):
    def write(self, pages: Pages, k: Any, v: Any, blocks: Any, places: Any) -> None:
        super().write(pages, k, v, blocks, places.flip(0))


class WrongMerge(ReferenceKernel):
    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        super().merge_rows(into, part, None if rows is None else rows.sort().values)


class BareMerge(ReferenceKernel):
    """The sigmoid form, which is NaN for empty and empty."""

    def merge_rows(self, into: Partial, part: Partial, rows: torch.Tensor | None) -> None:
        at = slice(None) if rows is None else rows
        weight = torch.sigmoid(part.lse - into.lse[at]).unsqueeze(-1)
        into.out[at] = into.out[at] + weight * (part.out - into.out[at])
        into.lse[at] = torch.logaddexp(into.lse[at], part.lse)


def test_a_wrong_write_or_merge_is_caught() -> None:
    assert "it is wrong by" in fault(WrongWrite(), LAYERS, 16, torch.float32, CPU)
    for kernel in (WrongMerge(), BareMerge()):
        found = fault(kernel, LAYERS, 16, torch.float32, CPU)
        assert found == "it is wrong in the merge of rows"


class NoCap(Mutant):
    """Knows no soft cap, and says so."""

    def refuses(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> str:
        return "it has no soft cap" if spec.softcap is not None else ""


def test_what_a_kernel_refuses_is_not_asked_of_it() -> None:
    kernel: PagedKernel = NoCap(spec_with(softcap=None))
    assert fault(kernel, LAYERS, 16, torch.float32, CPU) == ""
