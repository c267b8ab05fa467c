"""The model of ``init_inference`` from its two sources; idle plans while a caller is away."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_cp
from ds_cp.config import load_config
from ds_cp.engine.llm import _with_model
from ds_cp.engine.sign_of_life import SignOfLife
from ds_cp.errors import ConfigError
from ds_cp.model.borrowed import Borrowed
from ds_cp.plan import Idle, Outcome, Plan, Stop
from ds_cp.sampling_params import SamplingParams
from tests.helpers.engines import tiny_llama


def test_the_config_names_the_model_when_no_argument_does(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model": "hub/one"}')
    whole = load_config({"model": "hub/one"})
    for config in ({"model": "hub/one"}, str(file), file, whole):
        assert _with_model(config, None).model == "hub/one"
        assert _with_model(config, "hub/two").model == "hub/two"
    assert _with_model(None, "hub/two").model == "hub/two"
    nameless = tiny_llama()
    assert _with_model({}, nameless).model == "a loaded model"
    assert _with_model(whole, nameless).model == "hub/one"


@pytest.mark.parametrize("config", [None, {}, {"dtype": "fp32"}, {"model": ""}])
def test_no_model_at_all_is_an_error(config: Any) -> None:
    with pytest.raises(ConfigError, match="no model: give init_inference a model, or a config"):
        ds_cp.init_inference(config=config, env={})


ONE = {"kv_cache": {"tokens_per_rank": 64, "block_size": 16}, "comm": {"backend": "gloo"}}


@pytest.fixture
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("same_threads_after")
@pytest.mark.parametrize("late", ["KV budget", "tokenizer"])
def test_a_start_that_fails_late_gives_the_model_back(late: str) -> None:
    model = tiny_llama()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        want = model(input_ids=ids).logits
        if late == "KV budget":
            with pytest.raises(ConfigError, match="are free"):
                ds_cp.init_inference(model, {"kv_cache": {"memory_per_rank": "900TiB"}}, env={})
        else:
            with pytest.raises(Exception, match="added_tokens_decoder"):
                ds_cp.init_inference(model, ONE, tokenizer=object(), env={})
        assert torch.equal(model(input_ids=ids).logits, want)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.usefixtures("same_threads_after")
def test_one_model_serves_one_engine_at_a_time() -> None:
    model = tiny_llama()
    attention = model.config._attn_implementation
    params = SamplingParams(max_tokens=2, temperature=0.0)
    first = ds_cp.init_inference(model, ONE, env={})
    want = first.generate([1, 2, 3], params)
    for _ in range(2):
        with pytest.raises(ConfigError, match="an engine is already using this model; shut it"):
            ds_cp.init_inference(model, ONE, env={})
    again = first.generate([1, 2, 3], params)
    assert again[0].outputs[0].token_ids == want[0].outputs[0].token_ids
    first.shutdown()
    second = ds_cp.init_inference(model, ONE, env={})
    first.shutdown()  # takes nothing from the second
    assert model.config._attn_implementation == "ds_cp"
    second.shutdown()
    assert model.config._attn_implementation == attention


@pytest.mark.usefixtures("same_threads_after")
def test_two_models_in_one_process() -> None:
    """A job of one rank has no connections that another could be in the way of."""
    params = SamplingParams(max_tokens=4, temperature=0.0)
    models = [tiny_llama(seed=seed, initializer_range=0.2) for seed in (0, 1)]
    engines = [ds_cp.init_inference(model, ONE, env={}) for model in models]
    found = [engine.generate([1, 2, 3], params)[0].outputs[0].token_ids for engine in engines]
    engines[0].shutdown()
    again = engines[1].generate([1, 2, 3], params)[0].outputs[0].token_ids
    assert again == found[1] != found[0]
    engines[1].shutdown()


def test_an_engine_that_is_gone_does_not_hold_its_model() -> None:
    model = tiny_llama()
    attention = model.config._attn_implementation
    gone = Borrowed(model)
    gone.__enter__()
    with Borrowed(copy.deepcopy(model)):
        pass
    model.set_attn_implementation("eager")
    del gone
    gc.collect()
    with Borrowed(model):
        pass
    assert model.config._attn_implementation == attention


def test_idle_plans_are_led_only_while_the_caller_is_away() -> None:
    led: list[tuple[Plan, str]] = []

    def lead(plan: Plan) -> Outcome:
        led.append((plan, threading.current_thread().name))
        return Outcome()

    alive = SignOfLife(lead, 0.05)
    me = threading.current_thread().name
    with alive.away():
        pass
    count = len(led)
    time.sleep(0.2)
    assert len(led) == count, "the caller is in the engine: its own plans are enough"
    began = time.monotonic()
    with alive.away():
        while len(led) < count + 3 and time.monotonic() < began + 60:
            time.sleep(0.005)
    took = time.monotonic() - began
    assert 3 <= len(led) - count <= took / 0.05 + 1 and set(led) == {(Idle(), "ds_cp idle")}
    count = len(led)
    alive.lead(Stop())
    assert led[-1] == (Stop(), me)
    time.sleep(0.2)
    assert len(led) == count + 1
    alive.close()
    with SignOfLife(lead, None).away():  # one rank
        assert threading.active_count() >= 1
    assert len(led) == count + 1


def test_an_idle_plan_that_fails_is_raised_in_the_caller() -> None:
    tried = threading.Event()

    def lead(plan: Plan) -> Outcome:
        tried.set()
        raise OSError("a peer is gone")

    alive = SignOfLife(lead, 0.02)
    with pytest.raises(OSError, match="a peer is gone"), alive.away():
        assert tried.wait(60)
    alive.close()
