"""A start that fails on one rank ends on every rank, soon, with the cause, its rank and host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_cp.comm.wire import World
from ds_cp.engine import llm
from ds_cp.errors import DsCpError, ModelError, UserError
from ds_cp.startup import build, exactness, overhead, preload, reading
from tests.dist.test_engine import greedy, hf_greedy, make_prompt, tokens_of
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.ranks import run_ranks

KV: dict[str, Any] = {"block_size": 16, "tokens_per_rank": 512}
SOON = 30.0  # seconds for one start on a loaded machine; comm.timeout_s is 60
BY_ITSELF = ("_load", "fingerprint", "reference_logits", "shard_model", "probe_layers")
PHASES = (
    "compare", "decide_budget", "allocate_pool", "decide_slots", "open_slots", "achieved_flops",
)  # fmt: skip


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """``owner.name`` is ``make(before)`` meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def always(error: Exception) -> Callable[[Any], Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return lambda _: fail


def at_call(number: int, error: Exception) -> Callable[[Any], Any]:
    """The function as before, but its call ``number`` raises."""

    def make(before: Any) -> Any:
        calls = iter(range(1, 1000))

        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                raise error
            return before(*args, **kwargs)

        return run

    return make


def start(world: World, config: dict[str, Any]) -> tuple[Exception | None, float]:
    """The error of one start, and its seconds."""
    began = time.monotonic()
    try:
        engine_on(world, tiny_llama(), config)
    except DsCpError as err:
        return err, time.monotonic() - began
    return None, time.monotonic() - began


def failing_starts(world: World, tp_size: int, want: list[int]) -> list[str]:
    config = {"kv_cache": KV, "tensor_parallel": {"tp_size": tp_size}}
    bad = []
    attend = exactness.StepContext
    places: list[tuple[Any, str, Callable[[Exception], Any]]] = [
        *((preload, name, always) for name in BY_ITSELF),
        *((build, name, always) for name in PHASES),
    ]
    places += [(reading, name, always) for name in ("weight_reads", "reading_rate")]
    if tp_size == 1:  # with one group of ranks there is nothing to choose by it
        places += [(overhead, "_decoder", always)]
    # Inside the forward calls of the check: two layers in each of three steps.
    places += [
        (attend, "attend", lambda err, n=n: at_call(n, err)) for n in (1, 2, 4, 6)  # type: ignore[misc]
    ]
    errors = (ModelError("made up, and named"), RuntimeError("made up, and named"))
    for n, (owner, name, make) in enumerate(places):
        for rank in range(world.size):
            error = errors[(n + rank) % 2]
            if world.rank == rank:
                with replaced(owner, name, make(error)):
                    found, seconds = start(world, config)
            else:
                found, seconds = start(world, config)
            where = f"rank {rank} on {world.topology.hosts[rank]}: "
            words = [where, "made up, and named"]
            if isinstance(error, RuntimeError):
                words.append("fault of ds_cp")
            right = type(found) is (ModelError if isinstance(error, ModelError) else DsCpError)
            if not right or not all(w in str(found) for w in words) or seconds > SOON:
                bad.append(f"{name} fails on rank {rank}: {seconds:.1f} s, {found!r}")
    engine = engine_on(world, tiny_llama(initializer_range=0.2), config)  # the world is still good
    if engine.is_driver:
        assert tokens_of(engine.generate([make_prompt(40)], greedy(6))) == [want]
    else:
        engine.generate([make_prompt(40)], greedy(6))
    return bad


@pytest.mark.parametrize(
    ("tp_size", "hosts"), [(2, ["hosta", "hosta"]), (1, ["hosta", "hostb"])], ids=["tp", "cp"]
)
def test_every_rank_hears_the_cause(tp_size: int, hosts: list[str]) -> None:
    want = hf_greedy(tiny_llama(initializer_range=0.2), make_prompt(40), 6)
    for bad in run_ranks(failing_starts, 2, tp_size, want, hosts=hosts, timeout=300):
        assert not bad, "\n".join(bad)


BETWEEN = (("measure_links", 1), ("gather_blocks", 2), ("measure_overheads", 0))


def fault_between_phases(world: World, name: str, rank: int) -> tuple[str, str, float]:
    """Work of a start that exchanges messages, and no phase: it raises on ``rank`` alone."""
    fault = always(RuntimeError("made up, and named"))
    began = time.monotonic()
    try:
        if world.rank == rank:
            with replaced(build, name, fault):
                engine_on(world, tiny_llama(), {"kv_cache": KV})
        else:
            engine_on(world, tiny_llama(), {"kv_cache": KV})
    except Exception as err:
        return type(err).__name__, str(err), time.monotonic() - began
    return "", "nothing was raised", 0.0


@pytest.mark.parametrize(("name", "rank"), BETWEEN)
def test_a_fault_between_phases_is_heard_too(name: str, rank: int) -> None:
    hosts = ["hosta", "hostb", "hostc"]
    for kind, message, seconds in run_ranks(fault_between_phases, 3, name, rank, hosts=hosts):
        assert kind == "RankFailedError"
        assert message == f"rank {rank} on {hosts[rank]}: RuntimeError: made up, and named"
        assert seconds < SOON


def odd_tokenizer(world: World) -> None:
    """A tokenizer that the engine cannot use concerns rank 0 alone; all ranks raise."""
    with (
        replaced(llm, "join_job", lambda _: lambda *_: (world, 1)),
        pytest.raises(DsCpError, match="rank 0 on localhost: AttributeError"),
    ):
        llm.init_inference(tiny_llama(), {"kv_cache": KV}, tokenizer=object(), env={})


def test_a_tokenizer_of_no_use() -> None:
    run_ranks(odd_tokenizer, 2, timeout=60)


def no_memory(world: World) -> None:
    """Whatever torch raises where memory is short, it is the user's to mend, with the numbers."""
    config = {"kv_cache": KV}
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(12, "Cannot allocate memory"),
    ):
        make = always(error)
        if world.rank == 1:
            with replaced(preload, "_load", make), pytest.raises(UserError, match="enough memory"):
                engine_on(world, tiny_llama(), config)
            with replaced(build.allocate_pool.__globals__["KVPool"], "__init__", make):  # type: ignore[attr-defined]
                found, _ = start(world, config)
        else:
            with pytest.raises(UserError, match="rank 1 on localhost: not enough memory"):
                engine_on(world, tiny_llama(), config)
            found, _ = start(world, config)
        assert isinstance(found, UserError), found
        # the first pool of a start is that of the check
        assert "rank 1 on localhost: not enough memory" in str(found)


def test_memory_that_cannot_be_had() -> None:
    run_ranks(no_memory, 2, timeout=120)


def no_tokenizer(world: World, folder: str) -> None:
    """Only rank 0 reads the tokenizer; the others must not wait for it to join."""
    with replaced(llm, "join_job", lambda _: lambda *_: (world, 1)):
        began = time.monotonic()
        with pytest.raises(ModelError, match="rank 0 on localhost: .* no usable tokenizer"):
            llm.init_inference(folder, {"kv_cache": KV}, env={})
        assert time.monotonic() - began < SOON


def test_a_tokenizer_that_is_missing(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    run_ranks(no_tokenizer, 2, str(tmp_path), timeout=60)


# --- ranks hold the same model


def other_models(world: World) -> None:
    def model(rank: int) -> Any:
        if world.rank != rank:
            return tiny_llama()
        return made()

    def made() -> Any:
        return tiny_llama(**change) if change else tiny_llama(seed=5)

    for change, part in (
        ({}, "weights"),
        ({"num_hidden_layers": 3}, "config"),
        ({"rms_norm_eps": 1e-5}, "config"),
    ):
        for rank in range(world.size):
            with pytest.raises(ModelError) as caught:
                engine_on(world, model(rank), {"kv_cache": KV})
            host = world.topology.hosts[rank]
            assert str(caught.value).startswith(f"rank {rank} on {host} loaded another model")
            assert "other 2 ranks" in str(caught.value) and part in str(caught.value)
    one_element = tiny_llama()
    if world.rank == 2:
        one_element.model.norm.weight.data[-1] += 2**-10
    with pytest.raises(ModelError, match="rank 2 on hostb .*weights differ"):
        engine_on(world, one_element, {"kv_cache": KV})


def test_a_rank_with_another_model_is_named() -> None:
    """A mixture of two models would answer, and another depth would hang in the first step."""
    run_ranks(other_models, 3, hosts=["hosta", "hosta", "hostb"], timeout=120)


def two_models(world: World) -> None:
    with pytest.raises(ModelError) as caught:
        engine_on(world, tiny_llama(seed=5 + world.rank), {"kv_cache": KV})
    said = "rank 0 on hosta and rank 1 on hostb loaded models that differ in their weights"
    assert str(caught.value).startswith(said)


def test_of_two_ranks_both_are_named() -> None:
    run_ranks(two_models, 2, hosts=["hosta", "hostb"], timeout=60)


# --- the check sees what tensor parallel serves


def gemma3n() -> Any:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(3)
    return Gemma3nForCausalLM(Gemma3nTextConfig(
        vocab_size=128, vocab_size_per_layer_input=128, hidden_size=64, intermediate_size=128,
        hidden_size_per_layer_input=16, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_kv_shared_layers=0, sliding_window=16,
        max_position_embeddings=256, activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0],
        initializer_range=0.2, laurel_rank=8,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )).eval()  # fmt: skip


def refused_split(world: World) -> None:
    """Gemma 3n's MLP takes mean and deviation over the whole width, which a rank holds half of."""
    engine_on(world, gemma3n(), {"kv_cache": KV})
    for what in ("logits", "Gemma3nForCausalLM"):
        with pytest.raises(ModelError, match=what):
            engine_on(world, gemma3n(), {"kv_cache": KV, "tensor_parallel": {"tp_size": 2}})


def test_a_split_that_changes_the_model_is_refused() -> None:
    run_ranks(refused_split, 2, timeout=60)


def measured(world: World) -> list[float]:
    """What start-up measured, as the engine's facts have it, and the caller's next random number
    over the one that it should be."""
    torch.manual_seed(5)
    want = torch.rand(1).item()
    model = tiny_llama()
    torch.manual_seed(5)
    engine = engine_on(world, model, {"kv_cache": KV})
    facts = engine.facts
    assert facts.alone_bytes_per_s >= facts.bytes_per_s > 0 and facts.flops_per_s > 0
    assert facts.layer_weights == facts.stored_weights < facts.weights
    return [torch.rand(1).item() / want, facts.layer_s, facts.hop_s]


def test_rates_are_measured_and_leave_the_callers_draws_alone() -> None:
    for rank, (draw, layer, hop) in enumerate(run_ranks(measured, 3, timeout=120)):
        assert draw == 1.0
        assert 0 < layer < 1 and 0 <= hop < 5, "seconds"
        assert rank < 2 or hop == 0, "the ring is of two"
