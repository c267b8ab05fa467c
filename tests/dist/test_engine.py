"""The engine on 1 to 4 ranks says, token for token, what transformers says on one process.

Greedy tokens come from transformers' ``generate``; sampled ones from transformers' logits and the
sampler, which has its own test. Every step of the references has a clear winner (``CLEAR``), so
that rounding decides nothing. Logits of other architectures are in test_engine_logits.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from ds_cp.comm.wire import World
from ds_cp.startup import preload
from ds_cp.engine.llm import LLMEngine
from ds_cp.outputs import RequestOutput
from ds_cp.sampling_params import SamplingParams
from ds_cp.plan import Sampling
from ds_cp.worker.sampler import Row, sample_rows
from ds_cp.startup.agreement import Report, exchange_reports
from ds_cp.errors import CapacityError, ConfigError
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

Ids = tuple[int, ...]
PLACEMENTS = ("fill_then_spill", "round_robin", "balanced")
MODES = (("auto", "auto"), ("local", "auto"), ("ring", "kv"), ("ring", "q"), ("tree", "auto"))
LENGTHS = (1, 2, 3, 5, 9, 17, 30, 50, 80, 120, 160, 200)
NEW = 6
LONG = 20  # new tokens where requests must outgrow something
CLEAR = 1e-4  # least gap of the two best logits, in the references
NOT_ATTENTION = {"plan", "result", "move_kv"}  # the last: a prefix copied to where it is wanted


def the_model() -> PreTrainedModel:
    """A wide initial spread: the logits of the default are so level that rounding would decide."""
    return tiny_llama(initializer_range=0.2)


def make_prompt(length: int, seed: int = 0) -> Ids:
    rng = random.Random(1000 * seed + length)
    return tuple(rng.randrange(1, 128) for _ in range(length))


PROMPTS = [make_prompt(n) for n in LENGTHS]
SAMPLED = (0, 3, 5, 8, 11)  # prompts that are sampled as well
CROWD = [make_prompt(n, seed=1) for n in (20, 33, 7, 26, 14, 40, 11, 29)]


def sampled_params(n: int) -> SamplingParams:
    """How prompt ``n`` is sampled, each one differently."""
    return SamplingParams(
        temperature=0.7 + 0.1 * n, top_k=(0, 40, 5)[n % 3], top_p=(0.95, 1.0)[n % 2],
        min_p=(0.0, 0.01)[n % 2], seed=10**12 * (n - 3) + n, max_tokens=NEW,
    )  # fmt: skip


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **more)


# --- what transformers says


def hf_greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> Ids:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for logits in out.logits:
        best = logits[0].topk(2).values
        assert best[0] - best[1] > CLEAR, "a reference must not be a near-tie: take another seed"
    return tuple(out.sequences[0, len(prompt) :].tolist())


@torch.inference_mode()
def hf_sampled(model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams) -> Ids:
    assert params.seed is not None and params.max_tokens is not None
    ids = list(prompt)
    how = Sampling(
        temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p,
        seed=params.seed,
    )  # fmt: skip
    for index in range(params.max_tokens):
        logits = model(torch.tensor([ids])).logits[0, -1:]
        ids.append(sample_rows(logits, [Row(0, index, how)])[0].token)
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def want() -> dict[str, list[Ids]]:
    model = the_model()
    return {
        "greedy": [hf_greedy(model, prompt, NEW) for prompt in PROMPTS],
        "sampled": [hf_sampled(model, PROMPTS[n], sampled_params(n)) for n in SAMPLED],
        "crowd": [hf_greedy(model, prompt, LONG) for prompt in CROWD],
    }


# --- in the ranks


def make_engine(
    world: World,
    model: PreTrainedModel,
    tokens: int | Sequence[int],
    mode: tuple[str, str] = ("auto", "auto"),
    **sections: Mapping[str, Any],
) -> LLMEngine:
    """Blocks of 4. ``tokens``: KV per rank. ``sections``: more of the config."""
    config = {name: dict(values) for name, values in sections.items()}
    cp = {"mode": mode[0], "ring_pass": mode[1], **config.pop("context_parallel", {})}
    kv = {"block_size": 4, "tokens_per_rank": tokens, **config.pop("kv_cache", {})}
    return engine_on(world, model, {"context_parallel": cp, "kv_cache": kv, **config})


def tokens_of(outputs: Sequence[RequestOutput]) -> list[Ids]:
    return [output.outputs[0].token_ids for output in outputs]


def wrong(name: object, world: World, got: Sequence[Ids], expected: Sequence[Ids]) -> list[str]:
    """On rank 0, one line per difference; the others have nothing to compare."""
    if world.rank != 0:
        assert not got
        return []
    assert len(got) == len(expected)
    return [
        f"{world.size} ranks, {name}, prompt {n}: {a} instead of {b}"
        for n, (a, b) in enumerate(zip(got, expected, strict=True))
        if a != b
    ]


def same_tokens(world: World, want: dict[str, list[Ids]]) -> list[str]:
    """Every mode x placement, with layouts and step budgets taking turns, greedy and sampled
    requests in one batch; then one at a time."""
    model, size, bad = the_model(), world.size, []
    prompts = [*PROMPTS, *(PROMPTS[n] for n in SAMPLED)]
    params = [greedy(NEW)] * len(PROMPTS) + [sampled_params(n) for n in SAMPLED]
    expected = want["greedy"] + want["sampled"]
    for n, (mode, placement) in enumerate(itertools.product(MODES, PLACEMENTS)):
        engine = make_engine(
            world, model, 240 if mode[0] == "local" else 240 // size, mode,
            context_parallel={"layout": ("zigzag", "contiguous")[n % 2]},
            kv_cache={"placement": placement},
            scheduler={"max_num_batched_tokens": ("auto", 64, 16, "auto", 64)[n % 5]},
        )  # fmt: skip
        outputs = engine.generate(prompts, params)
        case = f"{mode} {placement} case {n}"
        bad += wrong(case, world, tokens_of(outputs), expected)
        if outputs:
            longest = outputs[len(PROMPTS) - 1].metrics.modes
            auto = ("local",) if size == 1 else ("ring", "tree")
            assert longest == (auto if mode[0] == "auto" else (mode[0],)), (case, longest)
        sent = set(world.ledger.schemes()) - NOT_ATTENTION
        if mode[0] == "local" or size == 1:
            assert not sent, f"{case}: local attention sent {sent}"
        else:
            assert any(name.startswith(("ring", "tree")) for name in sent), (case, sent)
    engine = make_engine(world, model, 240)
    alone = [engine.generate(PROMPTS[n], sampled_params(n)) for n in SAMPLED]
    return bad + wrong("alone", world, tokens_of(sum(alone, [])), want["sampled"])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_tokens_equal_transformers(size: int, want: dict[str, list[Ids]]) -> None:
    results = run_ranks(same_tokens, size, want, timeout=250)
    assert not sum(results, [])


# --- pools that are too small, unequal or exactly large enough


def crowded(world: World, want: dict[str, list[Ids]]) -> list[str]:
    """Eight requests in a pool of two or three: some are preempted, and tokens stay the same."""
    model, bad = the_model(), []
    for n, mode in enumerate(MODES):
        each = 64 if mode[0] == "local" else -(-64 // world.size)
        engine = make_engine(
            world, model, each, mode,
            kv_cache={"placement": PLACEMENTS[n % 3]},
            scheduler={"max_num_batched_tokens": (7, "auto")[n % 2]},
        )  # fmt: skip
        outputs = engine.generate(CROWD, greedy(LONG))
        bad += wrong(mode, world, tokens_of(outputs), want["crowd"])
        if outputs:
            assert sum(output.metrics.num_preemptions for output in outputs) > 0, mode
    return bad


def uneven(world: World, want: dict[str, list[Ids]]) -> list[str]:
    """Budgets of 1 : 2 : .. and of 1 : 3 : 1 ..: work is shared more evenly than KV, which then
    travels to its home once."""
    model, size, bad = the_model(), world.size, []
    ramp = [8 * (rank + 1) for rank in range(size)]
    hump = [8 * (3 if rank == 1 else 1) for rank in range(size)]
    modes = (("auto", "auto"), ("ring", "q"), ("tree", "auto"))
    for n, (weights, mode) in enumerate(itertools.product((ramp, hump), modes)):
        scale = -(-240 // sum(weights))
        engine = make_engine(
            world, model, [scale * w for w in weights], mode,
            context_parallel={"layout": ("zigzag", "contiguous")[n % 2]},
            kv_cache={"placement": ("fill_then_spill", "round_robin")[n // 3]},
        )  # fmt: skip
        outputs = engine.generate(PROMPTS, greedy(NEW))
        case = (weights, mode, n)
        bad += wrong(case, world, tokens_of(outputs), want["greedy"])
        if mode[0] != "auto" and weights == ramp and world.rank == 0:
            assert world.ledger["ship_kv"].bytes > 0, f"{case}: no KV was shipped"
    return bad


def grows_in_place(world: World, want: dict[str, list[Ids]]) -> list[str]:
    """Local while its rank has room, then spanning, by tree."""
    model, bad = the_model(), []
    for placement, n in zip(PLACEMENTS, (0, 3, 1), strict=True):
        engine = make_engine(world, model, 36, kv_cache={"placement": placement})
        outputs = engine.generate(CROWD[n], greedy(LONG))
        bad += wrong((placement, n), world, tokens_of(outputs), want["crowd"][n : n + 1])
        if outputs:
            assert outputs[0].metrics.modes == ("local", "tree")
        sent = world.ledger.schemes()
        assert "ship_kv" not in sent, "growing moves no KV"
        assert world.rank > 1 or {"tree_q", "tree_partials"} & set(sent)
    return bad


def small_pools(world: World, want: dict[str, list[Ids]]) -> list[str]:
    bad = crowded(world, want)
    if world.size > 1:
        bad += uneven(world, want) + grows_in_place(world, want)
    return bad


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_and_uneven_pools(size: int, want: dict[str, list[Ids]]) -> None:
    results = run_ranks(small_pools, size, want, timeout=250)
    assert not sum(results, [])


def exactly_full(
    world: World, budget: int | list[int], cases: list[tuple[Ids, int, Ids]]
) -> list[str]:
    """What fits to the last slot is served; one token more is refused with nothing run."""
    model, bad = the_model(), []
    have = 256
    for mode in (("auto", "auto"), ("ring", "q"), ("tree", "auto")):
        engine = make_engine(world, model, budget, mode)
        for prompt, count, expected in cases:
            outputs = engine.generate(prompt, greedy(count))
            bad += wrong((mode, len(prompt)), world, tokens_of(outputs), [expected])
        for length, count in ((320, 1), (257, 1), (256, 2), (1, 257)):
            before = world.ledger["plan"].exchanges
            if not engine.is_driver:
                engine.generate(make_prompt(length), greedy(count))
                continue
            with pytest.raises(CapacityError) as caught:
                engine.generate(make_prompt(length), greedy(count))
            error = caught.value
            assert (error.need, error.have, error.largest) == (length + count - 1, have, have)
            assert str(error.need) in str(error) and str(have) in str(error)
            assert world.ledger["plan"].exchanges == before + 1, "only the sign that it is over"
    return bad


@pytest.mark.parametrize(("size", "budget"), [(4, 64), (2, [64, 192]), (3, [128, 4, 124])])
def test_four_times_one_budget(size: int, budget: int | list[int]) -> None:
    """Exactly 4x one rank's budget of 64 is served, 5x is refused at once with the numbers."""
    model = the_model()
    cases = []
    for length, count in ((256, 1), (200, 57)):
        prompt = make_prompt(length, seed=2)
        cases.append((prompt, count, hf_greedy(model, prompt, count)))
    results = run_ranks(exactly_full, size, budget, cases, timeout=200)
    assert not sum(results, [])


# --- tensor parallel inside context parallel


def tensor_parallel(world: World, want: dict[str, list[Ids]]) -> list[str]:
    bad: list[str] = []
    for n, mode in enumerate(MODES):
        model = the_model()  # sharding changes it, so each engine has its own
        engine = make_engine(
            world, model, 240 if mode[0] == "local" else 120, mode,
            tensor_parallel={"tp_size": 2},
            scheduler={"max_num_batched_tokens": ("auto", 16)[n % 2]},
        )  # fmt: skip
        outputs = engine.generate(PROMPTS, greedy(NEW))
        bad += wrong(("tp 2", mode), world, tokens_of(outputs), want["greedy"])
        outputs = engine.generate([PROMPTS[n] for n in SAMPLED], list(map(sampled_params, SAMPLED)))
        bad += wrong(("tp 2 sampled", mode), world, tokens_of(outputs), want["sampled"])
        facts = engine.facts
        assert (facts.cp_size, facts.tp_size) == (2, 2)
        assert (facts.num_q_heads, facts.num_kv_heads) == (4, 2), "of the whole model"
        layer = model.model.layers[0]
        assert layer.self_attn.q_proj.weight.shape == (32, 64), "half of the query heads"
        assert layer.self_attn.k_proj.weight.shape == (16, 64)
        assert layer.mlp.down_proj.weight.shape == (64, 64)
        assert facts.bytes_per_token == 2 * 2 * 1 * 16 * 4, "half of the KV on each rank"
        assert world.ledger["tp_all_reduce"].exchanges > 0
    return bad


def refused_sharding(world: World) -> None:
    """Every rank hears it, and the world is still good for the next engine."""
    reports = exchange_reports(world, Report(2, "\N{CJK UNIFIED IDEOGRAPH-9577}" * 900))
    assert all(200 < len(report.message) < 900 for report in reports), "cut, by bytes"
    model = tiny_llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    with pytest.raises(ConfigError, match=r"tp_size is 2.*num_key_value_heads = 3"):
        make_engine(world, model, 240, tensor_parallel={"tp_size": 2})
    with pytest.raises(ConfigError, match=r"tp_size is 4.*num_attention_heads = 6"):
        make_engine(world, model, 240, tensor_parallel={"tp_size": 4})
    shard, preload.shard_model = preload.shard_model, lambda *_: 0
    try:  # a split that did nothing, as DeepSpeed's does in such a job
        with pytest.raises(ConfigError, match=r"4 local query heads do not make the model's 4"):
            make_engine(world, the_model(), 240, tensor_parallel={"tp_size": 2})
    finally:
        preload.shard_model = shard


def all_of_tensor_parallel(world: World, want: dict[str, list[Ids]]) -> list[str]:
    refused_sharding(world)
    return tensor_parallel(world, want)


def test_tensor_parallel_inside_context_parallel(want: dict[str, list[Ids]]) -> None:
    """cp 2 x tp 2 says what transformers says, which tp 1 does as well."""
    results = run_ranks(all_of_tensor_parallel, 4, want, timeout=200)
    assert not sum(results, [])


# --- memory, and logits that are no numbers

MIB = 2**20


def resident_kv(world: World, budget_mib: list[int]) -> float:
    """Growth of this process's resident memory with its KV budget, over the budget."""
    process = psutil.Process()
    model = the_model()
    small = make_engine(world, model, 4)
    small.generate([1, 2, 3], greedy(1))
    before = process.memory_info().rss
    config = {"kv_cache": {"block_size": 64, "memory_per_rank": [f"{n}MiB" for n in budget_mib]}}
    engine = engine_on(world, model, config)
    mine = budget_mib[world.rank] * MIB
    at_start = process.memory_info().rss - before
    engine.generate([make_prompt(500)] * 3, greedy(2))
    grown = process.memory_info().rss - before
    held = engine._worker.pool.nbytes
    assert 0.95 * mine <= held <= mine, (held, mine)
    assert engine.facts.blocks_per_rank[world.rank] * 64 * engine.facts.bytes_per_token == held
    assert at_start >= 0.95 * mine, "the memory is there before the first request"
    return grown / mine


def test_resident_memory_is_what_the_config_says() -> None:
    for ratio in run_ranks(resident_kv, 2, [256, 384]):
        assert 0.95 <= ratio <= 1.05, ratio


BROKEN = 99  # a token whose embedding is not a number


def not_a_number(world: World, want: dict[str, list[Ids]]) -> list[str]:
    """One request's logits are NaN: it ends, its neighbours go on, and the request that gets its
    blocks (NaN still in them) gets its own tokens."""
    model, bad = the_model(), []
    healthy = [n for n, p in enumerate(PROMPTS) if BROKEN not in (*p, *want["greedy"][n])]
    assert len(healthy) >= 5
    whole = model.get_input_embeddings().weight.detach().clone()
    for mode in MODES:
        model.get_input_embeddings().weight.data.copy_(whole)
        each = 240 if mode[0] == "local" else -(-240 // world.size)
        engine = make_engine(world, model, each, mode)
        model.get_input_embeddings().weight.data[BROKEN] = float("nan")
        prompts = [PROMPTS[n] for n in healthy]
        poison = [(*make_prompt(n, seed=4), BROKEN, 5) for n in (3, 90)]
        for _ in range(2):
            mixed = [poison[0], *prompts, poison[1]]
            outputs = engine.generate(mixed, greedy(NEW, logprobs=2))
            expected = [(), *(want["greedy"][n] for n in healthy), ()]
            bad += wrong(mode, world, tokens_of(outputs), expected)
            if outputs:
                reasons = [output.outputs[0].finish_reason for output in outputs]
                assert reasons == ["error", *["length"] * len(healthy), "error"]
    return bad


@pytest.mark.parametrize("size", [1, 3])
def test_logits_that_are_not_numbers(size: int, want: dict[str, list[Ids]]) -> None:
    results = run_ranks(not_a_number, size, want, timeout=200)
    assert not sum(results, [])
