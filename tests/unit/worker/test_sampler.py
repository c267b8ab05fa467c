"""Sampling against numpy and plain Python written from the definitions, draws against their
distribution, and rows beside others against rows alone."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from ds_cp.plan import Sampled, Sampling
from ds_cp.worker import sampler
from ds_cp.worker.choose import best_ids
from ds_cp.worker.sampler import History, Row, sample_rows, score_prompt
from ds_cp.worker.together import sample_together

VOCAB = 50


def how(**changes: Any) -> Sampling:
    return Sampling(**{"seed": 3, "min_tokens": 10**6, **changes})


def sample(
    request: int,
    logits_V: torch.Tensor,
    way: Sampling,
    index: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> Sampled:
    """One row alone."""
    (sampled,) = sample_rows(logits_V[None], [Row(request, index, way, History(prompt, output))])
    return sampled


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
    x[list(way.early_banned)] = -math.inf
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
    return Counter(sample(0, logits, how(**way), i).token for i in range(count))


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
    {"early_banned": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)},
    {"top_k": 5, "early_banned": (1, 2), "logit_bias": ((1, 100.0),)},
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


def test_top_p_of_equals_keeps_the_lowest_ids() -> None:
    """190 of 200 equal tokens have 0.95 together, or one less or more by rounding."""
    logits = torch.zeros(200)
    seen = {sample(0, logits, how(top_p=0.95), i).token for i in range(4000)}
    assert seen in (set(range(189)), set(range(190)), set(range(191)))


def test_seeds_are_as_good_as_indices() -> None:
    """First tokens of 2,000 requests with neighbouring seeds, and with far ones."""
    logits = torch.zeros(10)
    for seeds in (range(2000), range(-1000, 1000), [i << 32 for i in range(2000)]):
        seen = Counter(sample(0, logits, how(seed=s)).token for s in seeds)
        chi2 = sum((seen[i] - 200) ** 2 / 200 for i in range(10))
        assert chi2 <= 9 + 5 * math.sqrt(18)
    pairs = Counter(
        (sample(0, logits, how(seed=s)).token, sample(0, logits, how(seed=s), 1).token)
        for s in range(4000)
    )
    chi2 = sum((pairs[i, j] - 40) ** 2 / 40 for i in range(10) for j in range(10))
    assert chi2 <= 99 + 5 * math.sqrt(2 * 99), "a request's tokens are independent"


def test_a_draw_is_named_by_seed_and_index() -> None:
    logits = some_logits(9)
    ids = [sample(0, logits, how(seed=77), i).token for i in range(50)]
    again = [sample(5, logits.clone(), how(seed=77), i).token for i in reversed(range(50))]
    assert ids == again[::-1]
    for other in (78, -77, 77 + 2**32, 77 + 2**62, -(2**63)):
        assert [sample(0, logits, how(seed=other), i).token for i in range(50)] != ids
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
    x[list(way.get("early_banned", ()))] = -math.inf
    assert sample(1, logits, how(**way)) == Sampled(1, int(np.argmax(x)), 0.0)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0])
    assert sample(0, logits, how(temperature=0.0)).token == 1
    assert sample(0, logits, how(temperature=0.0, early_banned=(1,))).token == 3


def test_low_temperature_comes_close_to_greedy() -> None:
    logits = some_logits(2)
    assert set(draws(logits, {"temperature": 0.01}, 50)) == {int(logits.argmax())}


def test_bf16_logits_and_untouched_input() -> None:
    logits = some_logits(4).bfloat16()
    before = logits.clone()
    got = sample(0, logits, how(logit_bias=((3, 50.0),), early_banned=(4,), logprobs=2))
    assert got.token == 3
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("changed", [False, True])
def test_logprobs_are_of_the_model_not_of_the_filters(
    temperature: float, count: int, changed: bool
) -> None:
    logits = some_logits(6)
    way = how(temperature=temperature, logprobs=count)
    if changed:
        way = how(
            temperature=temperature, top_k=3, top_p=0.9, logprobs=count, early_banned=(1,),
            repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5,
        )  # fmt: skip
    got = sample(0, logits, way, 2, prompt=(3, 4), output=(5, 3))
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


# --- the random numbers

GOLDEN = 0x9E3779B97F4A7C15


def splitmix(state: int) -> int:
    """As in the paper, in numpy's 64-bit integers."""
    with np.errstate(over="ignore"):
        z = np.uint64(state % 2**64) + np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


def test_draws_invert_the_cumulative_distribution() -> None:
    """So that a draw is the same in every version: seeds are published."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of seed 1234567
    assert [splitmix(1234567 + i * GOLDEN) for i in range(3)] == known
    for seed in (0, 5, -1, 2**62, -(2**63)):
        logits = some_logits(seed % 97, size=3000)
        cumulative = np.cumsum(np_softmax(logits.double().numpy()))
        for index in range(100):
            uniform = (splitmix(splitmix(seed) + index) >> 11) / 2**53
            want = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
            assert sample(0, logits, how(seed=seed), index).token == want


# --- penalties and bans

TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)


def penalized(
    logits: Sequence[float], way: Sampling, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Bias, then penalties, token by token in fp64."""
    bias = dict(way.logit_bias)
    scores = []
    for token, logit in enumerate(logits):
        x = logit + bias.get(token, 0.0)
        if token in prompt or token in output:
            x = x / way.repetition_penalty if x > 0 else x * way.repetition_penalty
        x -= way.frequency_penalty * list(output).count(token)
        x -= way.presence_penalty * (token in output)
        scores.append(x)
    return scores


def a_bias(rng: random.Random) -> tuple[tuple[int, float], ...]:
    ids = rng.sample(range(VOCAB), rng.choice([0, 3]))
    return tuple((token, rng.uniform(-3, 3)) for token in sorted(ids))


@given(
    st.randoms(use_true_random=False), TOKENS, TOKENS, st.sampled_from([0.5, 0.9, 1.0, 1.3, 10.0]),
    st.sampled_from([-2.0, 0.0, 0.3, 2.0]), st.sampled_from([-2.0, 0.0, 0.7, 2.0]),
)  # fmt: skip
def test_penalties_in_plain_python(
    rng: random.Random,
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    way = how(
        temperature=0.0, logit_bias=a_bias(rng), repetition_penalty=repetition,
        presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip
    logits = some_logits(rng.randrange(10**6))
    scores = penalized(logits.tolist(), way, prompt, output)
    got = sample(0, logits, way, len(output), prompt, output).token
    assert scores[got] >= max(scores) - 1e-4


def test_penalized_draws_follow_the_distribution() -> None:
    way = how(
        temperature=0.8, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=-0.3,
        logit_bias=((2, 1.5),),
    )  # fmt: skip
    logits, prompt, output = some_logits(8, size=12), (1, 2, 2, 5), (5, 7, 7, 7, 2)
    scores = np.array(penalized(logits.tolist(), way, prompt, output)) / way.temperature
    expected = 3000 * np_softmax(scores)
    seen = Counter(sample(0, logits, way, i, prompt, output).token for i in range(3000))
    chi2 = sum((seen[i] - expected[i]) ** 2 / expected[i] for i in range(12))
    assert chi2 <= 11 + 5 * math.sqrt(22)
    plain = 3000 * np_softmax(logits.double().numpy() / way.temperature)
    assert sum((seen[i] - plain[i]) ** 2 / plain[i] for i in range(12)) > 100, "they matter here"


@pytest.mark.parametrize("penalty", [0.3, 0.9, 1.1, 1.5, 9.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for case in range(20):
        rng = random.Random(case)
        logits = some_logits(case, size=300)
        ids = [rng.randrange(300) for _ in range(rng.choice([1, 30, 500]))]
        cut = rng.randrange(len(ids) + 1)
        theirs = processor(torch.tensor([ids]), logits[None].clone())[0]
        for temperature in (0.0, 1.0):
            way = how(temperature=temperature, seed=case, repetition_penalty=penalty)
            plain = how(temperature=temperature, seed=case)
            ours = [sample(0, logits, way, i, ids[:cut], ids[cut:]).token for i in range(20)]
            assert ours == [sample(0, theirs, plain, i).token for i in range(20)]


def test_penalties_look_where_they_should() -> None:
    """Presence and frequency at the output only, repetition at the prompt as well; the bias counts
    before the repetition penalty, a ban whatever the penalties."""
    logits = torch.tensor([2.0, 1.5, 1.0])
    greedy = {"temperature": 0.0}
    for name, value in (("presence_penalty", 1.1), ("frequency_penalty", 1.1)):
        way = how(**greedy, **{name: value})
        assert sample(0, logits, way, prompt=(0, 1, 1)).token == 0
        assert sample(0, logits, way, 1, output=(0,)).token == 1
        assert sample(0, logits, way, 2, output=(0, 1)).token == 2
    assert sample(0, logits, how(**greedy, presence_penalty=0.7), 2, output=(0, 0)).token == 1
    assert sample(0, logits, how(**greedy, presence_penalty=0.4), 2, output=(0, 0)).token == 0
    assert sample(0, logits, how(**greedy, frequency_penalty=0.4), 2, output=(0, 0)).token == 1
    doubled = how(**greedy, repetition_penalty=2.0)
    assert sample(0, logits, doubled, prompt=(0,)).token == 1
    assert sample(0, logits, doubled, 1, prompt=(0,), output=(1,)).token == 0  # 1, 0.75, 1
    biased = how(**greedy, repetition_penalty=4.0, logit_bias=((0, -3.0), (1, -4.5), (2, -3.6)))
    assert (
        sample(0, logits, biased, prompt=(0,)).token == 2
    )  # -4, -3, -2.6; the other order: -2.5, -3, -2.6
    wanted = how(**greedy, presence_penalty=-2.0, early_banned=(0,))
    assert sample(0, logits, wanted, 1, output=(0,)).token == 1


def test_extreme_values_still_give_a_token() -> None:
    """The smallest penalty and temperature that the parameters allow do not overflow."""
    logits = some_logits(3)
    tiny = 5e-324
    for temperature in (0.0, tiny, 1e-30, 2.0):
        for repetition in (tiny, 1e-30, 10.0):
            for ids in ((), (4,), tuple(range(VOCAB))):
                way = how(temperature=temperature, repetition_penalty=repetition)
                assert 0 <= sample(0, logits * 1e3, way, 5, ids, ids).token < VOCAB
    assert sample(0, logits, how(temperature=tiny)).token == int(logits.argmax())
    assert sample(0, logits, how(top_p=tiny, min_p=0.5)).token == int(logits.argmax())
    assert sample(0, logits, how(top_k=2**31 - 1, min_p=1.0)).token == int(logits.argmax())
    some = logits.clone()
    some[:40] = -math.inf
    way = how(repetition_penalty=tiny, presence_penalty=-2.0)
    assert sample(0, some, way, 2, (1, 2), (3, 4)).token >= 40, "what cannot come still cannot"
    assert sample(0, logits, how(repetition_penalty=tiny), prompt=(7, 7)).token in (
        7,
        int(logits.argmax()),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5])
def test_early_bans_end_with_min_tokens(temperature: float, min_tokens: int) -> None:
    """The token after ``min_tokens`` others may be an end; none before it."""
    logits = torch.full((VOCAB,), -20.0)
    logits[9], logits[4] = 20.0, 10.0
    way = how(temperature=temperature, min_tokens=min_tokens, early_banned=(9, 11))
    tokens = [sample(0, logits, way, i).token for i in range(7)]
    assert tokens == [4] * min_tokens + [9] * (7 - min_tokens)


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_early_bans_are_those_of_transformers(min_tokens: int) -> None:
    """The same ids are out of reach after each number of new tokens."""
    prompt, ends = [5, 6], [9, 11]
    theirs = MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, ends, "cpu")
    way = how(temperature=0.0, min_tokens=min_tokens, early_banned=tuple(ends))
    for count in range(5):
        logits = some_logits(count)
        logits[9], logits[11] = 50.0, 40.0
        scores = theirs(torch.tensor([[*prompt, *[1] * count]]), logits[None].clone())
        assert sample(0, logits, way, count).token == int(scores.argmax())


@pytest.mark.parametrize(
    "way", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.1}], ids=str
)
def test_nothing_allowed_gives_no_token(way: dict[str, Any]) -> None:
    none = how(**way, early_banned=tuple(range(VOCAB)), logprobs=2)
    assert sample(3, some_logits(1), none) == Sampled(3, -1, 0.0)


# --- rows beside others

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 4},
    {"temperature": 0.0, "logit_bias": ((3, 4.0), (7, -9.0))},
    {"temperature": 0.0, "early_banned": (1, 2, 3)},
    {"temperature": 0.0, "early_banned": (1, 2, 3), "min_tokens": 1},
    {"temperature": 0.0, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    {},
    {"logprobs": 0},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.7, "top_p": 0.8},
    {"min_p": 0.05, "frequency_penalty": 1.0},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "logprobs": 5, "logit_bias": ((2, 3.0),)},
]


def mixed(seed: int, vocab: int, copies: int) -> tuple[torch.Tensor, list[Row]]:
    rng = random.Random(seed)
    rows = []
    for number in range(len(KINDS) * copies):
        output = [rng.randrange(vocab) for _ in range(rng.randrange(30))]
        way = how(**KINDS[number % len(KINDS)], seed=rng.randrange(-(2**63), 2**63))
        rows.append(Row(number, len(output), way, History([rng.randrange(vocab)] * 3, output)))
    rng.shuffle(rows)
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return logits, rows


@pytest.mark.parametrize(("vocab", "copies"), [(VOCAB, 6), (1000, 4), (49152, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_other_rows(vocab: int, copies: int, dtype: torch.dtype) -> None:
    """Bit for bit, log-probabilities too: one by one, all at once, in parts and in other orders."""
    logits, rows = mixed(vocab, vocab, copies)
    logits = logits.to(dtype)
    before = logits.clone()
    alone = [sample_rows(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert all(got.token >= 0 for got in alone)
    assert sample_rows(logits, rows) == alone
    for seed in range(4):
        part = random.Random(seed).sample(range(len(rows)), random.Random(seed).randint(2, 12))
        assert sample_rows(logits[part], [rows[i] for i in part]) == [alone[i] for i in part]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert sample_rows(logits, rows) == alone, "nor on the number of threads"
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits, before)


def test_draws_are_the_same_beside_any_rows() -> None:
    """Fifty tokens of five seeded requests that step together, and of each alone."""
    table = torch.randn(50, 5, 400, generator=torch.Generator().manual_seed(0)) * 2
    ways = [how(seed=s, temperature=0.9, top_p=0.95, presence_penalty=0.4) for s in range(5)]
    together: list[list[int]] = [[] for _ in ways]
    for index in range(50):
        rows = [Row(r, index, way, History((), together[r])) for r, way in enumerate(ways)]
        for got in sample_rows(table[index], rows):
            together[got.request].append(got.token)
    for r, way in enumerate(ways):
        alone: list[int] = []
        for index in range(50):
            alone.append(sample(r, table[index, r], way, index, (), alone).token)
        assert alone == together[r]
    assert len({tuple(drawn) for drawn in together}) == 5


@given(
    st.integers(0, 10**6), st.integers(1, 8),
    st.sampled_from([1, 2, 50, 255, 256, 257, 511, 512, 513, 1000, 1024]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_batched_greedy_is_the_first_best(
    seed: int, count: int, vocab: int, dtype: torch.dtype
) -> None:
    """With many equals, tokens that cannot come, and rows that are not next to each other."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 3, (2 * count, vocab), generator=generator).to(dtype)
    logits[torch.rand(2 * count, vocab, generator=generator) < 0.3] = -math.inf
    logits = logits[::2]
    rows = [Row(r, 0, how(temperature=0.0)) for r in range(count)]
    want = []
    for row in logits.tolist():
        want.append(-1 if max(row) == -math.inf else row.index(max(row)))
    assert [got.token for got in sample_rows(logits, rows)] == want
    assert [int(row.argmax()) for row, token in zip(logits, want, strict=True) if token >= 0] == [
        token for token in want if token >= 0
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
def test_one_bad_row_leaves_the_others(bad: float | str) -> None:
    logits, rows = mixed(1, VOCAB, 2)
    want = sample_rows(logits, rows)
    for place in range(0, len(rows), 5):
        broken = logits.clone()
        if isinstance(bad, str):
            broken[place] = -math.inf
        else:
            broken[place, 31] = bad
        got = sample_rows(broken, rows)
        assert got[place] == Sampled(rows[place].request, -1, 0.0)
        assert got[:place] + got[place + 1 :] == want[:place] + want[place + 1 :]


def test_no_rows_and_wrong_rows() -> None:
    assert sample_rows(torch.empty(0, VOCAB), []) == []
    assert score_prompt(torch.empty(0, VOCAB), [], 3) == []
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        sample_rows(torch.zeros(2, VOCAB), [Row(0, 0, how())])
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        score_prompt(torch.zeros(2, VOCAB), [1], 0)


# --- prompts


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_prompt_scores_in_fp64(count: int, top: int) -> None:
    logits = torch.randn(count, 300, generator=torch.Generator().manual_seed(count)) * 4
    tokens = [(7 * t) % 300 for t in range(count)]
    got = score_prompt(logits, tokens, top)
    assert len(got) == count
    for token, row, (logprob, best) in zip(tokens, logits.double().numpy(), got, strict=True):
        want = np.log(np_softmax(row))
        order = np.argsort(-want)[:top].tolist()
        assert logprob == pytest.approx(want[token], abs=1e-5)
        assert [i for i, _ in best] == order
        assert [x for _, x in best] == pytest.approx(want[order].tolist(), abs=1e-5)
    parts = [score_prompt(logits[t : t + 1], tokens[t : t + 1], top)[0] for t in range(count)]
    assert parts == got, "the same in one chunk or many"


def test_prompt_scores_edges() -> None:
    logits = torch.randn(3, 4).bfloat16()
    scores = score_prompt(logits, (0, 1, 2), 20)
    assert [len(top) for _, top in scores] == [4, 4, 4], "no more than there are"
    want = torch.log_softmax(logits.double(), dim=-1)
    assert [s.logprob for s in scores] == pytest.approx([float(want[t, t]) for t in range(3)])
    logits[1, 2] = math.nan
    again = score_prompt(logits, (0, 1, 2), 20)
    assert math.isnan(again[1].logprob)
    assert again[0] == scores[0] and again[2] == scores[2]


def test_a_history_is_kept_from_draw_to_draw() -> None:
    """Grown token by token or made at once: the same ids, counts and draws."""
    rng = random.Random(4)
    prompt = [rng.randrange(VOCAB) for _ in range(300)]
    output = [rng.randrange(VOCAB) for _ in range(200)]
    way = how(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1)
    grown = History(prompt)
    cpu = torch.device("cpu")
    for n in range(0, 200, 1):
        whole = History(prompt, output[:n])
        rows = [Row(0, n, way, grown), Row(0, n, way, whole)]
        logits = some_logits(n)[None].expand(2, -1)
        kept, fresh = sample_rows(logits, rows)
        assert kept == fresh
        ids, counts = grown.output(cpu)
        assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == Counter(output[:n])
        assert grown.prompt_ids(cpu).tolist() == sorted(set(prompt))
        grown.append(output[n : n + 1])


def test_a_history_grows_on_the_device_of_the_logits() -> None:
    """With 65 distinct tokens the tensors need more room, on a device other than the CPU too."""
    meta = torch.device("meta")
    history = History(range(10))
    for token in range(200):
        history.append((token,))
        ids, counts = history.output(meta)
        assert ids.device == counts.device == meta and len(ids) == len(counts) == token + 1
    assert history.prompt_ids(meta).device == meta


def test_a_long_prompt_costs_once() -> None:
    """100,000 tokens were made a tensor for each row and token: 27 ms. Now the first draw pays."""
    vocab = 49152
    history = History([i % vocab for i in range(100_000)], range(500))
    rows = [Row(0, 500, how(temperature=0.0, repetition_penalty=1.1), history)]
    logits = some_logits(1, vocab)[None]
    times = []
    for _ in range(20):
        began = time.perf_counter()
        sample_rows(logits, rows)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    torch.tensor([i % vocab for i in range(100_000)])
    rebuilding = time.perf_counter() - began
    assert min(times[1:]) < rebuilding / 3, (times, rebuilding)


def test_a_row_that_raises_gets_no_token() -> None:
    """Its neighbours get theirs. An id outside the vocabulary makes torch raise."""
    rows = [
        Row(1, 0, how()), Row(2, 0, how(logit_bias=((VOCAB, 1.0),))), Row(3, 0, how(logprobs=2))
    ]  # fmt: skip
    logits = torch.stack([some_logits(n) for n in range(3)])
    first, second, third = sample_rows(logits, rows)
    assert second == Sampled(2, -1, 0.0)
    assert [first] == sample_rows(logits[:1], rows[:1])
    assert [third] == sample_rows(logits[2:], rows[2:])


# --- the way of a GPU, on the CPU


def together(logits_RV: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """As ``sample_rows`` where logits are on a GPU: no row by itself."""
    return sampler._in_lots(logits_RV, best_ids(logits_RV), rows)


def as_good(got: Sequence[Sampled], want: Sequence[Sampled], logits_RV: torch.Tensor) -> None:
    """The same tokens and log-probabilities; of equals among the best, any."""
    assert [s.token for s in got] == [s.token for s in want]
    assert [s.logprob for s in got] == [s.logprob for s in want]
    for mine, other in zip(got, want, strict=True):
        assert [value for _, value in mine.top] == [value for _, value in other.top]


@pytest.mark.parametrize(("vocab", "copies"), [(VOCAB, 6), (1000, 4), (49152, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_chosen_together_are_those_chosen_alone(
    vocab: int, copies: int, dtype: torch.dtype
) -> None:
    for seed in range(3):
        logits, rows = mixed(vocab + seed, vocab, copies)
        logits = logits.to(dtype)
        before = logits.clone()
        got = together(logits, rows)
        as_good(got, sample_rows(logits, rows), logits)
        assert torch.equal(logits, before)
        alone = [together(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
        assert got == alone, "bit for bit, whatever the company"
        part = random.Random(seed).sample(range(len(rows)), 5)
        assert together(logits[part], [rows[i] for i in part]) == [alone[i] for i in part]


@given(
    st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([1, 2, 7, 50, 300]),
    st.sampled_from([0.01, 1.0, 30.0]), st.booleans(),
)  # fmt: skip
def test_any_rows_together(seed: int, count: int, vocab: int, spread: float, equals: bool) -> None:
    """Any filters side by side, many equal scores, rows that are no numbers, tokens that cannot
    come."""
    rng = random.Random(seed)
    logits = some_logits(seed, count * vocab, spread).view(count, vocab)
    if equals:
        logits = logits.round()
    chance = torch.Generator().manual_seed(seed)
    logits[torch.rand(count, vocab, generator=chance) < 0.2] = -math.inf
    if rng.random() < 0.3:
        logits[rng.randrange(count), rng.randrange(vocab)] = rng.choice([math.nan, math.inf])
    rows = []
    for number in range(count):
        output = [rng.randrange(vocab) for _ in range(rng.choice([0, 3, 80]))]
        biases = rng.sample(range(vocab), min(vocab, rng.choice([0, 0, 3])))
        way = how(
            temperature=rng.choice([0.0, 1e-30, 0.7, 1.0, 2.0]), top_k=rng.choice([-1, 0, 3, 40]),
            top_p=rng.choice([1e-320, 0.1, 0.8, 1.0, 1.0]), min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
            seed=rng.randrange(-(2**63), 2**63), logprobs=rng.choice([-1, 0, 2, 20]),
            repetition_penalty=rng.choice([5e-324, 1.0, 1.0, 1.7]),
            presence_penalty=rng.choice([0.0, 0.5]), frequency_penalty=rng.choice([0.0, -0.4]),
            early_banned=tuple(rng.sample(range(vocab), min(vocab, rng.choice([0, 0, 2, 300])))),
            logit_bias=tuple((t, rng.uniform(-5, 5)) for t in sorted(biases)),
        )  # fmt: skip
        prompt = [rng.randrange(vocab) for _ in range(rng.choice([0, 4]))]
        rows.append(Row(number, len(output), way, History(prompt, output)))
    as_good(together(logits, rows), sample_rows(logits, rows), logits)


def test_the_number_of_operations_does_not_grow_with_the_rows() -> None:
    """What is launched on a GPU, and how often the host waits for it: once for how many tokens a
    filter leaves, once for the answer."""

    def launched(count: int) -> Counter[str]:
        rows = [
            Row(n, 0, how(top_p=0.9, temperature=0.5 + n / 64, seed=n, logprobs=2))
            for n in range(count)
        ]
        logits = torch.randn(count, 300, generator=torch.Generator().manual_seed(0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            together(logits, rows)
        return Counter(event.name for event in found.events() if event.name.startswith("aten::"))

    few, many = launched(2), launched(64)
    assert few == many
    assert many["aten::item"] == 1 and many["aten::nonzero"] == 1, "the two that wait, with the end"


def test_an_id_outside_the_vocabulary_is_found_before_the_device_sees_it() -> None:
    logits = torch.stack([some_logits(n) for n in range(3)])
    for bad in (how(logit_bias=((VOCAB, 1.0),)), how(early_banned=(-1,))):
        rows = [Row(1, 0, how()), Row(2, 0, bad), Row(3, 0, how(logprobs=2))]
        with pytest.raises(ValueError, match="in a vocabulary of 50"):
            sample_together(logits, best_ids(logits), [0, 1, 2], rows)
        first, second, third = together(logits, rows)
        assert second == Sampled(2, -1, 0.0)
        assert [first, third] == sample_rows(logits[[0, 2]], [rows[0], rows[2]])


def test_more_rows_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = mixed(3, 1000, 4)
    want = together(logits, rows)
    monkeypatch.setattr(sampler, "TOGETHER", 2500)
    assert together(logits, rows) == want


@pytest.mark.gpu
def test_rows_on_a_gpu_are_those_on_the_cpu() -> None:
    """Draws by the same numbers; a GPU rounds sums in another order, so a few may differ."""
    logits, rows = mixed(5, 32000, 8)
    want = sample_rows(logits, rows)
    got = sample_rows(logits.cuda(), rows)
    assert sum(a.token != b.token for a, b in zip(got, want, strict=True)) <= 1
    alone = [sample_rows(logits[i : i + 1].cuda(), [row])[0] for i, row in enumerate(rows)]
    assert [s.token for s in alone] == [s.token for s in got]
