"""Partials on the wire, byte by byte: out in the model's dtype, then lse in fp32, per query."""

from __future__ import annotations

import struct

import pytest
import torch

from ds_cp.attention.spec import LayerSpec
from ds_cp.attention.state import NEG_INF, Partial
from ds_cp.attention.wireform import new_rows, row_bytes, unpack_partial
from tests.helpers.attention_cases import laid_out
from tests.helpers.wire_rows import pack_partial

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def spec_of(num_heads: int, head_dim: int) -> LayerSpec:
    return LayerSpec(num_heads, 1, head_dim, 1.0)


def partial_of(num_tokens: int, num_heads: int, head_dim: int) -> Partial:
    gen = torch.Generator().manual_seed(3)
    out = torch.randn(num_tokens, num_heads, head_dim, generator=gen)
    lse = torch.randn(num_tokens, num_heads, generator=gen) * 30
    if num_tokens > 1:
        out[1], lse[1] = 0.0, NEG_INF  # a query that saw nothing
    return Partial(out, lse)


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "dtype", "want"),
    [
        (32, 128, torch.bfloat16, 8_320),  # 32 * (128 * 2 + 4)
        (32, 128, torch.float32, 16_512),  # 32 * (128 * 4 + 4)
        (9, 64, torch.float32, 2_340),  # 9 * (64 * 4 + 4)
        (1, 3, torch.float16, 10),  # 1 * (3 * 2 + 4)
    ],
)
def test_row_bytes(num_heads: int, head_dim: int, dtype: torch.dtype, want: int) -> None:
    spec = spec_of(num_heads, head_dim)
    assert row_bytes(spec, dtype) == want
    packed = pack_partial(partial_of(5, num_heads, head_dim), dtype)
    assert packed.shape == (5, want) and packed.dtype == torch.uint8 and packed.is_contiguous()


def test_a_row_read_by_hand() -> None:
    """Two queries, H = 2, D = 3, fp32: six numbers of out, then two of lse, in each row."""
    out = torch.tensor([[[1.5, -2.0, 0.25], [3.0, 4.0, -0.5]], [[0.0] * 3, [9.0, 8.0, 7.0]]])
    lse = torch.tensor([[0.125, -7.5], [NEG_INF, 88.0]])
    rows = pack_partial(Partial(out, lse), torch.float32)
    first = struct.unpack("=8f", bytes(rows[0].tolist()))
    second = struct.unpack("=8f", bytes(rows[1].tolist()))
    assert first == (1.5, -2.0, 0.25, 3.0, 4.0, -0.5, 0.125, -7.5)
    assert second == (0.0, 0.0, 0.0, 9.0, 8.0, 7.0, NEG_INF, 88.0)


def test_a_bf16_row_read_by_hand() -> None:
    """bf16 is the upper half of fp32, rounded to nearest even; lse keeps all of its bits."""
    out = torch.tensor([[[1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8]]])
    lse = torch.tensor([[1.0 + 2**-20]])
    row = bytes(pack_partial(Partial(out, lse), torch.bfloat16)[0].tolist())
    halves = struct.unpack("=3H", row[:6])
    widened = [struct.unpack("=f", struct.pack("=I", half << 16))[0] for half in halves]
    assert widened == [1.0, 1.0, 1.0 + 2 * 2**-7]
    assert struct.unpack("=f", row[6:]) == (1.0 + 2**-20,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_roundtrip_rounds_once(dtype: torch.dtype, num_tokens: int) -> None:
    """fp32 comes back bit for bit, the others after one rounding, in their own dtype; lse always
    bit for bit."""
    part = partial_of(num_tokens, 3, 5)
    back = unpack_partial(pack_partial(part, dtype), 3, 5, dtype)
    assert back.out.dtype == dtype and back.lse.dtype == torch.float32
    assert back.out.shape == (num_tokens, 3, 5) and back.lse.shape == (num_tokens, 3)
    assert torch.equal(back.lse, part.lse)
    assert torch.equal(back.out, part.out.to(dtype))
    again = unpack_partial(pack_partial(back, dtype), 3, 5, dtype)
    assert torch.equal(again.out, back.out)  # a second trip changes nothing


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_partials_and_slices_of_rows(dtype: torch.dtype) -> None:
    """Kernels return transposed views; receivers cut one buffer into several blocks."""
    part = partial_of(6, 3, 5)
    strided = Partial(
        part.out.transpose(0, 1).contiguous().transpose(0, 1), part.lse.T.contiguous().T
    )
    assert not strided.out.is_contiguous() and not strided.lse.is_contiguous()
    rows = pack_partial(part, dtype)
    assert torch.equal(pack_partial(strided, dtype), rows)
    low, high = (unpack_partial(block, 3, 5, dtype) for block in rows.split([2, 4]))
    whole = unpack_partial(rows, 3, 5, dtype)
    assert torch.equal(torch.cat([low.out, high.out]), whole.out)
    assert torch.equal(torch.cat([low.lse, high.lse]), whole.lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_reads_in_place(dtype: torch.dtype) -> None:
    """Numbers that are aligned in their rows are not copied: nothing lies between the wire and the
    merge. Of three heads of five dims in 16 bit lse is not aligned."""
    for dim, in_place in ((6, True), (5, dtype.itemsize == 4)):
        rows = pack_partial(partial_of(4, 3, dim), dtype)
        back = unpack_partial(rows, 3, dim, dtype)
        assert back.out.dtype == dtype
        rows.zero_()
        assert (not back.out.any() and not back.lse.any()) == in_place


def test_values_of_another_head_dim() -> None:
    """V's dim counts, not K's: 2 * (24 * 2 + 4) bytes."""
    spec = LayerSpec(2, 1, 16, 1.0, v_head_dim=24)
    part = partial_of(3, 2, 24)
    assert row_bytes(spec, torch.bfloat16) == 104
    assert new_rows(3, spec, torch.bfloat16, part.out).shape == (3, 104)
    back = unpack_partial(pack_partial(part, torch.bfloat16), 2, 24, torch.bfloat16)
    assert torch.equal(back.out, part.out.to(torch.bfloat16)) and torch.equal(back.lse, part.lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_any_strides(num_heads: int, dtype: torch.dtype) -> None:
    """As kernels return them: heads first, one head (a column that counts as contiguous, whose
    stride is not 1), numbers apart."""
    part = partial_of(4, num_heads, 6)
    want = pack_partial(part, dtype)
    heads_first = Partial(
        part.out.transpose(0, 1).contiguous().transpose(0, 1), part.lse.t().contiguous().t()
    )
    apart = Partial(laid_out(part.out, "every_other"), laid_out(part.lse, "every_other"))
    swapped = Partial(laid_out(part.out, "swapped"), part.lse.expand(2, -1, -1)[1])
    for odd in (heads_first, apart, swapped, Partial(part.out, part.lse[:, :].t().clone().t())):
        assert torch.equal(pack_partial(odd, dtype), want)
