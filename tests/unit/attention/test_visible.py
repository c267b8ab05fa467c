"""Rows of a step picked by number, against plain indexing."""

from __future__ import annotations

import pytest
import torch

from ds_cp.attention.batch import IndexUpload
from ds_cp.attention.visible import Rows


@pytest.mark.parametrize(
    "rows", [[], [3], [2, 3, 4], [5, 9, 7], [4, 3, 2], [0, 2], [7, 5, 9, 8], list(range(3, 9))]
)
def test_rows_in_any_order(rows: list[int]) -> None:
    """Blocks of a request have any numbers: the last of three out of order may be two above the
    first."""
    upload = IndexUpload()
    picked = Rows(rows, upload)
    upload.send(torch.device("cpu"))
    x = torch.randn(10, 3)
    want = x[torch.tensor(rows, dtype=torch.int64)]
    assert picked.count == len(rows) and torch.equal(picked.of(x), want)
    out = torch.empty_like(want)
    picked.copy(x, out)
    assert torch.equal(out, want)
