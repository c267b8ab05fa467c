"""The model of ``init_inference`` from its two sources; idle plans while a caller is away."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ds_cp
from ds_cp.config import load_config
from ds_cp.engine.llm import _with_model
from ds_cp.engine.sign_of_life import SignOfLife
from ds_cp.errors import ConfigError
from ds_cp.plan import Idle, Outcome, Plan, Stop
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


def test_idle_plans_are_led_only_while_the_caller_is_away() -> None:
    led: list[tuple[Plan, str]] = []

    def lead(plan: Plan) -> Outcome:
        led.append((plan, threading.current_thread().name))
        return Outcome()

    alive = SignOfLife(lead, 0.05)
    me = threading.current_thread().name
    with alive.away():
        pass
    time.sleep(0.2)
    assert led == [], "the caller is in the engine: its own plans are enough"
    with alive.away():
        time.sleep(0.4)
    count = len(led)
    assert 2 <= count <= 8 and set(led) == {(Idle(), "ds_cp idle")}
    alive.lead(Stop())
    assert led[-1] == (Stop(), me)
    time.sleep(0.2)
    assert len(led) == count + 1
    alive.close()
    with SignOfLife(lead, None).away():  # one rank
        assert threading.active_count() >= 1
    assert len(led) == count + 1


def test_an_idle_plan_that_fails_is_raised_in_the_caller() -> None:
    def lead(plan: Plan) -> Outcome:
        raise OSError("a peer is gone")

    alive = SignOfLife(lead, 0.02)
    with pytest.raises(OSError, match="a peer is gone"), alive.away():
        time.sleep(0.3)
    alive.close()
