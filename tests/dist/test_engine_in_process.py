"""The engine inside one's own script: ``init_inference`` and ``generate``, with a tiny model object
and directory on one rank, and with the real small model on two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ds_cp
from ds_cp.comm.wire import World
from ds_cp.engine.collect import PromptRequest, RequestFailure
from ds_cp.errors import CapacityError, ConfigError, ModelError, RequestError, TopologyError
from ds_cp.outputs import RequestOutput
from tests.dist.test_engine import Ids, greedy, hf_greedy, make_prompt, tokens_of, wrong
from tests.helpers.engines import engine_on, tiny_llama
from tests.helpers.tiny import make_tiny_model
from tests.helpers.ranks import run_ranks

CONFIG: dict[str, Any] = {"kv_cache": {"block_size": 4, "tokens_per_rank": 128}}
TEXTS = ["one", "two and three", "4 "]
NOBODY: dict[str, str] = {}  # the environment of a plain python process


def object_and_its_errors(world: World) -> None:
    """A model object on one rank, without and then with a tokenizer."""
    world.leave()  # run_ranks has joined for us; this is about joining by oneself
    model = tiny_llama(initializer_range=0.2)
    prompts = [make_prompt(n) for n in (3, 40, 17)]
    want = [hf_greedy(model, prompt, 5) for prompt in prompts]

    engine = ds_cp.init_inference(model, CONFIG, env=NOBODY)
    assert engine.is_driver
    assert tokens_of(engine.generate(list(prompts[0]), greedy(5))) == want[:1]
    assert tokens_of(engine.generate(prompts[1], greedy(5))) == want[1:2]
    outputs = engine.generate([list(p) for p in prompts], greedy(5, logprobs=1))
    assert tokens_of(outputs) == want
    found = [output.metrics.cached_tokens for output in outputs]
    assert found == [0, 36, 0], "the whole blocks before the last token of a prompt seen before"
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt and output.prompt is None and output.finished
        [completion] = output.outputs
        assert (completion.index, completion.finish_reason, completion.text) == (0, "length", "")
        assert completion.logprobs is not None
        for token, said in zip(completion.token_ids, completion.logprobs, strict=True):
            assert said.token_id == token and said.top == ((token, said.logprob),)
        times = output.metrics
        assert times.first_scheduled_time and times.first_token_time and times.finished_time
        assert (
            times.arrival_time
            <= times.first_scheduled_time
            <= times.first_token_time
            <= times.finished_time
        )
    each = engine.generate(prompts, [greedy(n) for n in (1, 5, 2)])
    assert tokens_of(each) == [ids[:n] for ids, n in zip(want, (1, 5, 2), strict=True)]
    assert engine.generate([]) == []
    assert len(engine.generate([5])[0].outputs[0].token_ids) == 16, "the default parameters"

    bad: list[tuple[Any, Any, str]] = [
        ("text", greedy(1), "needs a tokenizer"),
        (["text"], greedy(1), "needs a tokenizer"),
        ([[]], greedy(1), "the prompt is empty"),
        ([[1], []], greedy(1), "the prompt is empty"),
        ([[1], [True]], greedy(1), "text or token ids, not True"),
        ([[1.5]], greedy(1), "text or token ids, not 1.5"),
        ([[1], [128]], greedy(1), "outside the vocabulary"),
        ([-1], greedy(1), "outside the vocabulary"),
        ([[1], [2]], [greedy(1)], "2 prompts but 1 sampling params"),
        ([1], greedy(1, stop="x"), "stop strings need a tokenizer"),
        ([1], greedy(1, stop_token_ids=(128,)), "outside the vocabulary"),
        ([1] * 100, greedy(30), "needs KV for 129 tokens"),
        ([[1], [1] * 129], greedy(1), "needs KV for 129 tokens"),
    ]
    steps = engine._core.stats().steps  # type: ignore[union-attr]
    for prompt, params, words in bad:
        with pytest.raises(RequestError, match=words):
            engine.generate(prompt, params)
    assert engine._core.stats().steps == steps, "nothing ran"  # type: ignore[union-attr]
    assert not engine._core.has_work  # type: ignore[union-attr]
    assert tokens_of(engine.generate(prompts, greedy(5))) == want, "and the engine is well"

    engine.shutdown()
    engine.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        engine.generate([1], greedy(1))
    # the model is the caller's: transformers runs it again as before
    assert hf_greedy(model, prompts[0], 5) == want[0]


def more_prompts_than_the_queue(world: World) -> None:
    """A bad prompt far behind is refused before the first one runs; good ones all come out."""
    model = tiny_llama(initializer_range=0.2)
    prompts = [make_prompt(n) for n in (3, 9, 2, 5, 8, 1, 4)]
    want = [hf_greedy(model, prompt, 2) for prompt in prompts]
    config = {**CONFIG, "scheduler": {"max_queue": 2, "max_num_seqs": 1}}
    engine = ds_cp.init_inference(model, config, env=NOBODY)
    with pytest.raises(CapacityError):
        engine.generate([*prompts, [1] * 129], greedy(1))
    assert engine._core.stats().steps == 0  # type: ignore[union-attr]
    assert tokens_of(engine.generate(prompts, greedy(2))) == want
    engine.shutdown()


def directory_and_text(world: World, folder: str, config: str) -> None:
    """A directory with a tokenizer of its own, and a config file."""
    world.leave()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    want = [hf_greedy(model, prompt, 6) for prompt in ids]

    engine = ds_cp.init_inference(folder, config, env=NOBODY)
    summary = "\n".join(engine.summary())
    assert "128 tokens" in summary
    assert len(engine.generate("one", greedy(6, ignore_eos=True))) == 1
    outputs = engine.generate([*TEXTS[:2], ids[2]], greedy(6, ignore_eos=True))
    assert tokens_of(outputs) == want
    assert [output.prompt for output in outputs] == [*TEXTS[:2], None]
    assert [list(output.prompt_token_ids) for output in outputs] == ids
    assert [o.outputs[0].text for o in outputs] == [tokenizer.decode(t) for t in want]
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate(["one", ""], greedy(1))
    half = "half a surrogate pair \ud800"
    with pytest.raises(RequestError, match="cannot encode the prompt"):
        engine.generate(["one", half], greedy(1))
    asked = [PromptRequest("a", half), PromptRequest("b", TEXTS[1], greedy(6, ignore_eos=True))]
    refused, answer = engine.stream(asked)
    assert isinstance(refused, RequestFailure) and refused.request_id == "a"
    assert isinstance(answer, RequestOutput) and tokens_of([answer]) == [want[1]]

    text = tokenizer.decode(want[1])
    stop = next(text[i : i + 2] for i in range(1, len(text) - 1) if "\ufffd" not in text[i : i + 2])
    [stopped] = engine.generate(TEXTS[1], greedy(6, ignore_eos=True, stop=stop))
    completion = stopped.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    [stopped] = engine.generate(TEXTS[1], greedy(6, ignore_eos=True, stop_token_ids=[want[1][2]]))
    first = want[1].index(want[1][2])
    assert stopped.outputs[0].token_ids == want[1][: first + 1]
    assert stopped.outputs[0].stop_reason == want[1][2]
    engine.shutdown()

    # the same with the object and a tokenizer given
    engine = ds_cp.init_inference(model, CONFIG, tokenizer=tokenizer, env=NOBODY)
    assert tokens_of(engine.generate(TEXTS, greedy(6, ignore_eos=True))) == want
    engine.shutdown()


def refused_starts(world: World, folder: str) -> None:
    """Nothing is half-started: after each refusal the next start works."""
    world.leave()
    model = tiny_llama()
    bad: list[tuple[Any, Any, type[Exception], str]] = [
        (folder + "/nowhere", CONFIG, ModelError, "does not exist"),
        (model, {"kv_cach": {}}, ConfigError, "kv_cache"),
        (model, {**CONFIG, "max_model_len": 513}, ConfigError, "at most 512"),
        (model, {"kv_cache": {"tokens_per_rank": [64, 64]}}, ConfigError, "lists 2"),
        (model, {"kv_cache": {"memory_per_rank": "4KiB"}}, ConfigError, "room for 8 tokens"),
        (model, {"kv_cache": {"memory_per_rank": "900TiB"}}, ConfigError, "are free"),
        (model, {**CONFIG, "context_parallel": {"size": 2}}, TopologyError, "2"),
        (model, {**CONFIG, "tensor_parallel": {"tp_size": 2}}, TopologyError, "2"),
    ]
    for given, config, kind, words in bad:
        with pytest.raises(kind, match=words) as caught:
            ds_cp.init_inference(given, config, env=NOBODY)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2  # type: ignore[attr-defined]
    engine = ds_cp.init_inference(model, CONFIG, env=NOBODY)
    with pytest.raises(CapacityError):
        engine.generate([1] * 129, greedy(1))
    engine.shutdown()


def whole_life(world: World, folder: str, config: str) -> None:
    object_and_its_errors(world)
    more_prompts_than_the_queue(world)
    directory_and_text(world, folder, config)
    refused_starts(world, folder)


def test_embedded_on_one_rank(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": "tiny", **CONFIG}))
    run_ranks(whole_life, 1, str(folder), str(config), timeout=180)


# --- the real model

REAL_NEW = 24
REAL_LENGTHS = (5, 130, 700)


def real_prompts(folder: Path) -> list[Ids]:
    """Prose of three lengths; the longest counts through a list, so that it is not one sentence
    again and again."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    short = tokenizer("The capital of France is Paris and")["input_ids"][:5]
    story = " ".join(
        f"On day {n} the ship sailed {n * 7 % 31} miles {way}, and the crew ate {what}."
        for n, (way, what) in enumerate(
            [(w, f) for w in ("north", "east", "south", "west", "home") for f in
             ("bread", "fish", "rice", "beans", "apples", "soup", "cheese", "nothing")], 1
        )
    )  # fmt: skip
    ids = tokenizer(story)["input_ids"]
    assert len(ids) >= REAL_LENGTHS[-1]
    return [tuple(short), tuple(ids[: REAL_LENGTHS[1]]), tuple(ids[-REAL_LENGTHS[2] :])]


def real_model(world: World, folder: str, prompts: Sequence[Ids], want: Sequence[Ids]) -> list[str]:
    """Two ranks of 448 tokens: the longest prompt spans both, whatever the mode."""
    bad, model = [], AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for mode in ("ring", "tree"):
        config = {
            "dtype": "fp32",
            "context_parallel": {"mode": mode},
            "kv_cache": {"block_size": 64, "tokens_per_rank": 448},
        }
        engine = engine_on(world, model, config)
        outputs = engine.generate(prompts, greedy(REAL_NEW, ignore_eos=True))
        bad += wrong(mode, world, tokens_of(outputs), want)
        if outputs:
            assert [output.metrics.modes for output in outputs] == [(mode,)] * len(prompts)
        assert any(scheme.startswith(("ring", "tree")) for scheme in world.ledger.schemes())
    return bad


def test_smollm2_on_two_ranks(smollm2: Path) -> None:
    prompts = real_prompts(smollm2)
    assert tuple(map(len, prompts)) == REAL_LENGTHS
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    want = [hf_greedy(model, prompt, REAL_NEW) for prompt in prompts]
    del model
    results = run_ranks(real_model, 2, str(smollm2), prompts, want, timeout=250)
    assert not sum(results, [])
