"""Masks in the logits, on both ways of choosing; log-probabilities are of the allowed tokens."""

from __future__ import annotations

import math

import pytest
import torch

from ds_cp.plan import Sampling
from ds_cp.worker.choose import Row, best_ids
from ds_cp.worker.masks import masked
from ds_cp.worker.sampler import sample_rows
from ds_cp.worker.together import sample_together

V = 83  # no multiple of 8
GRAMMAR = Sampling(grammar="start: /a/")


def mask_of(ids: list[int], size: int = -(-V // 8)) -> bytes:
    mask = bytearray(size)
    for token in ids:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


@pytest.mark.parametrize("size", [2, 11, 40])
def test_only_allowed_tokens_keep_their_logits(size: int) -> None:
    """Also where the tokenizer has fewer or more tokens than the model's vocabulary."""
    torch.manual_seed(0)
    logits = torch.randn(3, V)
    before = logits.clone()
    some = [0, 7, 8, 15]
    rows = [Row(0, 0, GRAMMAR, allowed=mask_of(some, size)), Row(1, 0, Sampling()),
            Row(2, 0, GRAMMAR, allowed=mask_of([82] if size > 10 else [3], size))]  # fmt: skip
    found = masked(logits, rows)
    assert torch.equal(logits, before)
    assert torch.isfinite(found[0]).nonzero()[:, 0].tolist() == some
    assert torch.equal(found[0, some], before[0, some]) and torch.equal(found[1], before[1])
    assert torch.isfinite(found[2]).nonzero()[:, 0].tolist() == ([82] if size > 10 else [3])
    assert masked(logits, rows[1:2] * 3) is logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_of_allowed_tokens_whatever_else_is_asked(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = (4 * torch.randn(40, V)).to(dtype)
    rows, allowed = [], []
    for n in range(40):
        ids = sorted(torch.randperm(V)[: 1 + n % 5].tolist())
        how = Sampling(
            temperature=(0.0, 1.5)[n % 2], top_k=(0, 3)[n % 3 == 0], top_p=(1.0, 0.8)[n % 4 == 0],
            logit_bias=((5, 50.0),), seed=n, logprobs=(-1, 4)[n % 2], grammar="x",
        )  # fmt: skip
        allowed.append(ids)
        rows.append(Row(n, 0, how, allowed=mask_of(ids)))
    one_by_one = sample_rows(logits, rows)
    bare = masked(logits, rows)
    together = sample_together(bare, best_ids(bare), range(40), rows)
    for n, (one, other) in enumerate(zip(one_by_one, together, strict=True)):
        assert one.token in allowed[n] and one.token == other.token
        if rows[n].how.logprobs >= 0:
            biased = logits[n].float() + torch.tensor([50.0 if i == 5 else 0.0 for i in range(V)])
            want = torch.log_softmax(biased[allowed[n]], 0)
            assert one.logprob == pytest.approx(float(want[allowed[n].index(one.token)]), abs=1e-5)
            listed = [(i, v) for i, v in one.top if v > -math.inf]
            assert {i for i, _ in listed} <= set(allowed[n])
            assert len(listed) == min(4, len(allowed[n]))


def test_a_row_that_allows_nothing_is_no_draw() -> None:
    rows = [Row(n, 0, GRAMMAR, allowed=mask_of([])) for n in range(2)]
    assert [s.token for s in sample_rows(torch.randn(2, V), rows)] == [-1, -1]
