"""Predictions: they move the right way, agree with the scheduler's own, and are said in full."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_cp.cost import Passing
from ds_cp.errors import ConfigError
from ds_cp.sizing.device import Device, device_names, read_device
from ds_cp.sizing.job import Job
from ds_cp.sizing.model import shape_of
from ds_cp.sizing.predict import MODES, cost_model, predict
from ds_cp.sizing.report import WIDTH, sizing, text_report
from tests.unit.sizing.llama import LLAMA_8B, SMALL

H100 = read_device("h100")
JOB = Job(4, 8, 1 << 20, "bf16")
CONTEXTS = st.integers(1, 1 << 21)


def faster(device: Device, field: str, times: float) -> Device:
    """The device with one number changed, by its path."""
    plain = device.model_dump()
    *way, last = field.split(".")
    at = plain
    for key in way:
        at = at[key]
    at[last] *= times
    return Device.model_validate(plain)


def times(context: int, device: Device = H100, **changes: Any) -> dict[tuple[str, int], Any]:
    job = replace(JOB, context=context, **changes)
    return {(p.mode, p.ranks): p for p in predict(LLAMA_8B, device, job)}


def test_every_mode_at_every_number_of_ranks() -> None:
    found = times(1 << 20)
    spans = {(mode, n) for mode in MODES if mode != "local" for n in (2, 4, 8, 16, 32)}
    assert set(found) == {("local", 1), *spans}
    assert all(p.ttft_s > 0 and p.tpot_s > 0 for p in found.values())


@settings(max_examples=20)
@given(CONTEXTS, CONTEXTS)
def test_a_longer_context_takes_longer(one: int, other: int) -> None:
    short, long = times(min(one, other)), times(max(one, other))
    for key in short:
        assert long[key].ttft_s >= short[key].ttft_s * (1 - 1e-9)
        assert long[key].tpot_s >= short[key].tpot_s * (1 - 1e-9)


@pytest.mark.parametrize(
    "field",
    ["rates.bf16.linear_tflops", "rates.bf16.attention_tflops", "memory.gb_per_s",
     "memory.kv_gb_per_s", "links.intra_host.gb_per_s", "links.inter_host.gb_per_s"],
)  # fmt: skip
@settings(max_examples=10)
@given(CONTEXTS)
def test_a_faster_machine_is_not_slower(field: str, context: int) -> None:
    slow, fast = times(context), times(context, faster(H100, field, 2.0))
    for key in slow:
        assert fast[key].ttft_s <= slow[key].ttft_s * (1 + 1e-9)
        assert fast[key].tpot_s <= slow[key].tpot_s * (1 + 1e-9)


@pytest.mark.parametrize(
    "field", ["layer_us", "links.intra_host.latency_us", "links.inter_host.latency_us"]
)
def test_a_longer_wait_is_longer(field: str) -> None:
    slow, fast = times(2000, faster(H100, field, 10.0)), times(2000)
    assert all(slow[key].tpot_s >= fast[key].tpot_s for key in fast)
    assert slow["tree", 32].tpot_s > fast["tree", 32].tpot_s


def test_a_long_prompt_is_faster_over_more_ranks_and_a_decode_is_not_by_much() -> None:
    found = times(1 << 20)
    for fewer, more in ((2, 4), (4, 8), (8, 16), (16, 32)):
        assert found["kv", more].ttft_s < found["kv", fewer].ttft_s
    assert found["kv", 32].ttft_s > found["local", 1].ttft_s / 32, "no better than even"
    reading = LLAMA_8B.active_of_rank(1) * 2 / 2.7e12
    assert all(p.tpot_s > reading for p in found.values())


def test_a_decode_reads_weights_and_kv() -> None:
    """By hand: bytes over 2.7e12 (weights) and 2.35e12 (KV) a second, 20 us a layer."""
    weights = (LLAMA_8B.active_of_rank(1) + 128256 * 4096) * 2
    want = weights / 2.7e12 + 100_000 * LLAMA_8B.kv_bytes(2, 1) / 2.35e12 + 32 * 20e-6
    assert times(100_000)["local", 1].tpot_s == pytest.approx(want, rel=1e-4)


def test_tensor_parallelism_shares_reading_and_adds_sums() -> None:
    alone, shared = times(1000), times(1000, tp=8)
    assert shared["local", 8].tpot_s < alone["local", 1].tpot_s
    sums = 32 * 2 * 2 * 10e-6
    assert shared["local", 8].tpot_s > sums


def test_experts_that_no_token_passes_are_not_read_in_a_decode() -> None:
    sparse = {**SMALL, "model_type": "mixtral", "num_local_experts": 8}
    two, eight = (
        predict(
            shape_of({**sparse, "num_experts_per_tok": n}, "m", "x"),
            H100,
            replace(JOB, context=1000),
        )
        for n in (2, 8)
    )
    assert two[0].tpot_s < 0.5 * eight[0].tpot_s


@pytest.mark.parametrize("mode", ["kv", "q", "tree"])
def test_over_one_rank_every_mode_is_local(mode: Passing) -> None:
    cost = cost_model(LLAMA_8B, H100, JOB, 1)
    assert cost.forward_s(mode, 1, 500, 100) == cost.forward_s("local", 1, 500, 100)


def test_links_are_those_of_the_ranks_in_use() -> None:
    inside, across = cost_model(LLAMA_8B, H100, JOB, 8), cost_model(LLAMA_8B, H100, JOB, 16)
    assert inside.bytes_per_s == 360e9 and inside.near_latency_s is None
    assert across.bytes_per_s == 26.1e9 and across.near_latency_s == pytest.approx(10e-6)
    hosts = replace(JOB, hosts=4, ranks_per_host=1)
    assert cost_model(LLAMA_8B, H100, hosts, 4).near_latency_s is None


# --- what is said

NUMBER, COUNT = {"type": "number"}, {"type": "integer", "minimum": 0}
TEXT = {"type": "string", "minLength": 1}


def strict(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


SCHEMA = strict(
    model=strict(
        name=TEXT, model_type={"type": "string"}, parameters=COUNT, active_parameters=COUNT,
        parameters_per_rank=COUNT, layers=COUNT, windowed_layers=COUNT,
        max_model_len={"type": ["integer", "null"]}, kv_bytes_per_token_and_rank=COUNT,
    ),
    device=strict(name=TEXT, description=TEXT),
    job=strict(hosts=COUNT, ranks_per_host=COUNT, context=COUNT, dtype=TEXT, tp=COUNT, cp=COUNT),
    memory_per_rank=strict(
        total=COUNT, reserved=COUNT, weights=COUNT, kv=COUNT, activations=COUNT,
        free={"type": "integer"}, kv_room=COUNT, fits={"type": "boolean"},
    ),
    host_memory=strict(per_rank=COUNT, tokens=COUNT, back_s={"type": ["number", "null"]}),
    largest_context={"type": "array", "minItems": 1, "items": strict(ranks=COUNT, tokens=COUNT)},
    predictions={
        "type": "array", "minItems": 1,
        "items": strict(
            mode={"enum": list(MODES)}, ranks=COUNT, ttft_s=NUMBER, tpot_s=NUMBER,
            holds_context={"type": "boolean"},
        ),
    },
    assumptions={"type": "array", "minItems": 5, "items": TEXT},
)  # fmt: skip


@pytest.mark.parametrize("device", device_names())
@pytest.mark.parametrize("context", [1, 1000, 1 << 24])
def test_json_has_its_schema_and_text_says_the_same(device: str, context: int) -> None:
    job = replace(JOB, context=context)
    found = sizing(LLAMA_8B, read_device(device), job)
    jsonschema.validate(json.loads(json.dumps(found, allow_nan=False)), SCHEMA)
    lines = text_report(found)
    text = "\n".join(lines)
    assert text.isascii() and max(map(len, lines)) < 400
    [bar] = [line.strip()[1:-1] for line in lines if line.startswith("  [")]
    assert len(bar) == WIDTH and bar[0] == "#"
    assert ("DOES NOT FIT" in text) == (not found["memory_per_rank"]["fits"])
    assert all(each in text for each in found["assumptions"])
    rows = [
        line
        for line in lines
        if not line.startswith("  fastest") and any(f" {name} " in line for name in MODES.values())
    ]
    assert len([r for r in rows if r.split()[0].isdigit()]) == len(found["predictions"])
    assert text.count("too few ranks") == sum(not p["holds_context"] for p in found["predictions"])


def test_the_fastest_is_of_those_that_hold_the_context() -> None:
    found = sizing(LLAMA_8B, H100, JOB)
    [said] = [line for line in text_report(found) if line.startswith("  fastest: ")]
    assert said.startswith("  fastest: 32 ranks, prefill ring, pass-KV ") and "decode tree" in said
    none = sizing(LLAMA_8B, H100, replace(JOB, context=1 << 28))
    assert "  no number of ranks here holds the context" in text_report(none)


def test_a_bar_is_in_proportion() -> None:
    found = sizing(LLAMA_8B, H100, replace(JOB, hosts=1, ranks_per_host=1, context=100_000))
    [bar] = [line for line in text_report(found) if line.startswith("  [")]
    memory = found["memory_per_rank"]
    for name, mark in (("weights", "#"), ("kv", "=")):
        share = memory[name] / (memory["total"] - memory["reserved"])
        assert abs(bar.count(mark) / WIDTH - share) < 0.03


def test_a_context_beyond_the_model_is_said() -> None:
    said = sizing(LLAMA_8B, H100, JOB)["assumptions"]
    assert any("made for 131072 positions" in each for each in said)
    assert any(each.startswith("source: ") for each in said)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hosts": 0}, "--hosts is 0"), ({"ranks_per_host": 2000}, "--ranks-per-host is 2000"),
        ({"hosts": 200, "ranks_per_host": 200}, "are 40000 ranks"), ({"tp": 3}, "--tp 3 does not"),
        ({"context": 0}, "--context is 0"), ({"context": 1 << 40}, "--context is"),
        ({"dtype": "int8"}, "--dtype is int8"), ({"tp": -1}, "--tp is -1"),
        ({"tp": 16, "ranks_per_host": 16}, "the model's 8 KV heads"),
    ],
)  # fmt: skip
def test_jobs_that_do_not_fit_together(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(JOB, **changes).check(LLAMA_8B)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_family_that_the_server_does_not_split() -> None:
    phi = shape_of({**SMALL, "model_type": "phi3"}, "m", "x")
    with pytest.raises(ConfigError, match="phi3 states no split"):
        sizing(phi, H100, replace(JOB, tp=2))
