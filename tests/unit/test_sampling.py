"""Sampling against numpy written from the definitions, and draws against their distribution."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.engine.plan import Sampled, Sampling
from ds_cp.engine.sampling import sample

VOCAB = 50


def how(**changes: Any) -> Sampling:
    fields: dict[str, Any] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3, "index": 0,
        "logprobs": -1, "logit_bias": (), "banned": (),
    }  # fmt: skip
    return Sampling(**{**fields, **changes})


def some_logits(seed: int, size: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def np_softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def np_probabilities(logits: torch.Tensor, way: Sampling) -> np.ndarray:
    """The distribution of the next token in fp64, filter by filter, token by token."""
    x = logits.double().numpy().copy()
    for token, bias in way.logit_bias:
        x[token] += bias
    x[list(way.banned)] = -math.inf
    x /= way.temperature
    best_first = sorted(range(len(x)), key=lambda i: -x[i])
    if way.top_k > 0:
        x[best_first[way.top_k :]] = -math.inf
    probs = np_softmax(x)
    mass, kept = 0.0, []
    for token in best_first:  # the smallest set of best tokens with mass >= top_p
        if mass >= way.top_p:
            break
        kept.append(token)
        mass += probs[token]
    probs = np.array([p if i in kept else 0.0 for i, p in enumerate(probs)])
    probs[probs < way.min_p * probs.max()] = 0.0
    return probs / probs.sum()


def draws(logits: torch.Tensor, way: dict[str, Any], count: int) -> Counter[int]:
    return Counter(sample(0, logits, how(**way, index=i)).token for i in range(count))


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 4},
    {"top_k": 1},
    {"top_k": VOCAB + 10},
    {"top_k": -1},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"logit_bias": ((3, 4.0), (7, -100.0), (11, 2.5))},
    {"banned": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)},
    {"top_k": 5, "banned": (1, 2), "logit_bias": ((1, 100.0),)},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_draws_follow_the_distribution(way: dict[str, Any]) -> None:
    """Chi-square over 2,000 draws with fixed seeds; the limit is 5 standard deviations."""
    count, logits = 2000, some_logits(5)
    probs = np_probabilities(logits, how(**way))
    seen = draws(logits, way, count)
    assert all(probs[token] > 0 for token in seen), "a token that the filters took away"
    likely = [i for i in range(VOCAB) if probs[i] * count >= 5]
    rare = count - sum(seen[i] for i in likely)
    pairs = [(seen[i], probs[i] * count) for i in likely]
    expected_rare = count * (1 - sum(probs[i] for i in likely))
    if expected_rare >= 5:
        pairs.append((rare, expected_rare))
    chi2 = sum((got - want) ** 2 / want for got, want in pairs)
    freedom = len(pairs) - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * max(freedom, 1)), (chi2, freedom)
    if freedom == 0:
        assert len(seen) == 1


def test_seeds_are_as_good_as_indices() -> None:
    """First tokens of 2,000 requests with neighbouring seeds, and with far ones."""
    logits = torch.zeros(10)
    for seeds in (range(2000), range(-1000, 1000), [i << 32 for i in range(2000)]):
        seen = Counter(sample(0, logits, how(seed=s)).token for s in seeds)
        chi2 = sum((seen[i] - 200) ** 2 / 200 for i in range(10))
        assert chi2 <= 9 + 5 * math.sqrt(18)
    pairs = Counter(
        (sample(0, logits, how(seed=s)).token, sample(0, logits, how(seed=s, index=1)).token)
        for s in range(4000)
    )
    chi2 = sum((pairs[i, j] - 40) ** 2 / 40 for i in range(10) for j in range(10))
    assert chi2 <= 99 + 5 * math.sqrt(2 * 99), "a request's tokens are independent"


def test_a_stream_is_named_by_seed_and_index() -> None:
    logits = some_logits(9)
    ids = [sample(0, logits, how(seed=77, index=i)).token for i in range(50)]
    again = [sample(5, logits.clone(), how(seed=77, index=i)).token for i in reversed(range(50))]
    assert ids == again[::-1]
    for other in (78, -77, 77 + 2**32, 77 + 2**62, -(2**63)):
        assert [sample(0, logits, how(seed=other, index=i)).token for i in range(50)] != ids
    torch.manual_seed(1)
    assert sample(0, logits, how(seed=77)).token == ids[0], "no global random state"
    state = torch.get_rng_state()
    sample(0, logits, how(seed=77))
    assert torch.equal(torch.get_rng_state(), state), "and none is used up"


@given(st.integers(0, 1000), st.sampled_from(WAYS))
def test_greedy_is_the_best_allowed(seed: int, way: dict[str, Any]) -> None:
    """At temperature 0 the filters that drop the tail change nothing."""
    logits = some_logits(seed)
    way = {**way, "temperature": 0.0}
    x = logits.double().numpy().copy()
    for token, bias in way.get("logit_bias", ()):
        x[token] += bias
    x[list(way.get("banned", ()))] = -math.inf
    assert sample(1, logits, how(**way)) == Sampled(1, int(np.argmax(x)), 0.0)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0])
    assert sample(0, logits, how(temperature=0.0)).token == 1
    assert sample(0, logits, how(temperature=0.0, banned=(1,))).token == 3


def test_low_temperature_comes_close_to_greedy() -> None:
    logits = some_logits(2)
    assert set(draws(logits, {"temperature": 0.01}, 50)) == {int(logits.argmax())}


def test_bf16_logits_and_untouched_input() -> None:
    logits = some_logits(4).bfloat16()
    before = logits.clone()
    got = sample(0, logits, how(logit_bias=((3, 50.0),), banned=(4,), logprobs=2))
    assert got.token == 3
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_of_the_model_not_of_the_filters(temperature: float, count: int) -> None:
    logits = some_logits(6)
    got = sample(0, logits, how(
        temperature=temperature, top_k=3, top_p=0.9, logprobs=count, banned=(1,),
    ))  # fmt: skip
    want = np.log(np_softmax(logits.double().numpy()))
    assert got.logprob == pytest.approx(want[got.token], abs=1e-5)
    assert len(got.top) == count
    best = sorted(range(VOCAB), key=lambda i: -want[i])[:count]
    assert [token for token, _ in got.top] == best
    assert [lp for _, lp in got.top] == pytest.approx([want[i] for i in best], abs=1e-5)


def test_logprobs_include_the_bias() -> None:
    logits = some_logits(6)
    got = sample(0, logits, how(temperature=0.0, logprobs=1, logit_bias=((8, 20.0),)))
    biased = logits.double().clone()
    biased[8] += 20
    want = float(torch.log_softmax(biased, 0)[8])
    assert got.token == 8 and got.logprob == pytest.approx(want, abs=1e-5)
    assert got.top[0] == (8, pytest.approx(want, abs=1e-5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_not_finite_gives_no_token(bad: float, temperature: float) -> None:
    logits = some_logits(1)
    logits[17] = bad
    assert sample(9, logits, how(temperature=temperature, logprobs=3)) == Sampled(9, -1, 0.0)
    assert sample(9, torch.full((VOCAB,), bad), how(temperature=temperature)).token == -1
    assert sample(9, torch.full((VOCAB,), -math.inf), how(temperature=temperature)).token == -1


def test_minus_infinity_is_a_token_that_cannot_come() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[[4, 9]] = 0.0
    assert set(draws(logits, {}, 100)) == {4, 9}
    assert sample(0, logits, how(temperature=0.0)).token == 4
