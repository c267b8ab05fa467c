"""The central test: every mode x layout x ranks x heads x lengths equals fp64 over the sequence.

Tolerances: fp32 max error <= 2e-6 of the largest reference value; bf16 <= 2 * 2**-8 of it (2 bf16
ulps at the scale of the output).
"""

from __future__ import annotations

import pytest
import torch

from ds_cp.comm.wire import World
from tests.helpers.attention_cases import LIMIT, cases, one_case, strided_cases
from tests.helpers.ranks import run_ranks, world_group


def check_all(world: World, dtype: torch.dtype, thin: int) -> list[str]:
    group = world_group(world)
    bad, count = [], 0
    for n, case in enumerate(cases(world.size)):
        if n % thin and "layout" in case and len(case) == 4:
            continue  # the plain ones are many; every special one stays
        for mode, pass_ in (("ring", "kv"), ("ring", "q"), ("tree", "kv")):
            error = one_case(group, case, dtype, mode, pass_)
            count += 1
            if not error <= LIMIT[dtype]:
                bad.append(f"rank {world.rank} {mode}/{pass_} {case}: {error:.2e}")
    assert count > 40
    return bad


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_fp32_on_one_host(size: int) -> None:
    results = run_ranks(check_all, size, torch.float32, 1 if size < 4 else 3)
    assert not sum(results, [])


def check_strided(world: World, dtype: torch.dtype) -> list[str]:
    """All modes; in mode local a rank's tokens are the whole sequence or none."""
    group, bad = world_group(world), []
    modes = [("local", "kv"), ("ring", "kv"), ("ring", "q"), ("tree", "kv")]
    for case in strided_cases(world.size):
        for mode, pass_ in modes:
            here = case
            if mode == "local":
                here = {**case, "home": 0, "counts": [case["new"]] + [0] * (world.size - 1)}
            error = one_case(group, here, dtype, mode, pass_)
            if not error <= LIMIT[dtype]:
                bad.append(f"rank {world.rank} {mode}/{pass_} {case}: {error:.2e}")
    return bad


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_inputs_whose_last_dimension_is_not_dense(dtype: torch.dtype) -> None:
    """Fused operators read on from the first number of a row, beyond the tensor too."""
    results = run_ranks(check_strided, 2, dtype) + run_ranks(check_strided, 3, dtype, hosts="aab")
    assert not sum(results, [])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_bf16_on_one_host(size: int) -> None:
    results = run_ranks(check_all, size, torch.bfloat16, 3)
    assert not sum(results, [])


@pytest.mark.parametrize("hosts", ["aabb", "abab", "aaab", "abc", "aabbc"])
def test_fp32_over_hosts(hosts: str) -> None:
    """Tree folds by levels here, and the ring enters each host once."""
    results = run_ranks(check_all, len(hosts), torch.float32, 3, hosts=list(hosts))
    assert not sum(results, [])
