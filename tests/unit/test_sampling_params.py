"""Bounds of the sampling parameters; each refusal names its field."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.sampling_params import RequestOptions, SamplingParams

HUGE = 10**5000  # more digits than Python turns into text

BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", -1),
    ("n", 65),
    ("n", 1.0),
    ("n", True),
    ("n", None),
    ("n", HUGE),
    ("temperature", -0.01),
    ("temperature", 2.01),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", None),
    ("temperature", HUGE),
    ("temperature", [0.5]),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", -1.0),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_k", 1.5),
    ("top_k", True),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.0),
    ("seed", "7"),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 2**31),
    ("max_tokens", 2.0),
    ("min_tokens", -1),
    ("min_tokens", 17),  # above the default max_tokens of 16
    ("min_tokens", 0.5),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", 1.0),
    ("prompt_logprobs", False),
    ("presence_penalty", -2.01),
    ("presence_penalty", 2.01),
    ("presence_penalty", math.nan),
    ("presence_penalty", True),
    ("presence_penalty", None),
    ("frequency_penalty", -2.01),
    ("frequency_penalty", 2.01),
    ("frequency_penalty", -math.inf),
    ("frequency_penalty", "1"),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 10.01),
    ("repetition_penalty", math.inf),
    ("repetition_penalty", math.nan),
    ("repetition_penalty", False),
    ("ignore_eos", 1),
    ("ignore_eos", None),
    ("skip_special_tokens", "no"),
    ("stop", 5),
    ("stop", True),
    ("stop", b"end"),
    ("stop", tuple(str(i) for i in range(5000))),
    ("stop", "x" * 10**6),
    ("stop", ("",)),
    ("stop", ""),
    ("stop", ("x" * 257,)),
    ("stop", tuple("abcdefghijklmnopq")),  # 17
    ("stop", (3,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (2**31,)),
    ("stop_token_ids", ("a",)),
    ("stop_token_ids", "12"),
    ("stop_token_ids", 3),
    ("stop_token_ids", (True,)),
    ("stop_token_ids", (HUGE,)),
    ("stop_token_ids", range(10**9)),
    ("logit_bias", [5]),
    ("logit_bias", 5),
    ("logit_bias", {5: True}),
    ("logit_bias", {True: 1.0}),
    ("logit_bias", {5: HUGE}),
    ("logit_bias", {HUGE: 1.0}),
    ("stop_token_ids", tuple(range(301))),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"x": 1.0}),
    ("logit_bias", {"-1": 1.0}),
    ("logit_bias", {"5.0": 1.0}),
    ("logit_bias", {" 5": 1.0}),
    ("logit_bias", {"": 1.0}),
    ("logit_bias", {"\u0665": 1.0}),  # a digit, but not one of JSON's
    ("logit_bias", {"5": 1.0, 5: 1.0}),
    ("logit_bias", {"9999999999": 1.0}),
    ("logit_bias", {5: np.float32("nan")}),
    ("logit_bias", {5: np.bool_(True)}),
    ("temperature", np.float64("inf")),
    ("temperature", np.bool_(True)),
    ("top_p", Fraction(1, 10**400)),  # no float but 0
    ("seed", np.float64(5.0)),
    ("max_tokens", np.bool_(True)),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", {5: -100.5}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {5: "much"}),
    ("logit_bias", dict.fromkeys(range(301), 0.5)),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{f}-{i}" for i, (f, _) in enumerate(BAD)])
def test_out_of_bounds_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3, "is 3;"), (np.float32(3), "is 3.0;"), (Fraction(5, 2), "is 2.5;"),
     (np.float32("nan"), "not nan"), (np.float16("inf"), "not inf"), ("x", "not 'x'")],
)  # fmt: skip
def test_a_refused_number_is_shown(value: Any, shown: str) -> None:
    with pytest.raises(RequestError, match=f"^temperature .*{shown}"):
        SamplingParams(temperature=value)


@pytest.mark.parametrize("value", [np.array([True]), 1, None, np.int8(1), "true"])
def test_only_a_boolean_is_one(value: Any) -> None:
    with pytest.raises(RequestError, match="ignore_eos must be true or false"):
        SamplingParams(ignore_eos=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("n", 64),
        ("temperature", 0),
        ("temperature", 2.0),
        ("top_p", 1e-9),
        ("top_p", 1),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("seed", 2**63 - 1),
        ("seed", -(2**63)),
        ("seed", None),
        ("max_tokens", 1),
        ("max_tokens", None),
        ("min_tokens", 16),
        ("logprobs", 0),
        ("logprobs", 20),
        ("prompt_logprobs", None),
        ("prompt_logprobs", 0),
        ("prompt_logprobs", 20),
        ("presence_penalty", -2),
        ("presence_penalty", 2.0),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", 1),
        ("repetition_penalty", 10.0),
        ("stop", ("x" * 256,)),
        ("stop_token_ids", (0, 2**31 - 1)),
        ("logit_bias", {0: -100.0, 2**31 - 1: 100}),
    ],
)
def test_edges_are_allowed(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_forms_of_stop() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


# What callers pass, and what a field then holds.
GIVEN: list[tuple[str, Any, Any]] = [
    *((name, given, want) for name in (
        "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty",
    ) for given, want in (
        (1, 1.0), (0.5, 0.5), (np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (np.int64(1), 1.0),
        (np.float16(0.25), 0.25), (np.uint8(1), 1.0),
    )),
    *((name, given(7), 7) for name in (
        "n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
    ) for given in (int, np.int64, np.int32, np.uint8)),
    ("logit_bias", {5: -100}, {5: -100.0}),
    ("logit_bias", {"5": -100, "17": 2.5}, {5: -100.0, 17: 2.5}),
    ("logit_bias", {np.int64(5): np.float32(1.5), 6: np.int8(3)}, {5: 1.5, 6: 3.0}),
    ("stop", "end", ("end",)),
    ("stop", ["a", np.str_("b")], ("a", "b")),
    ("stop_token_ids", [np.int64(3), 4], (3, 4)),
    ("stop_token_ids", np.array([3, 4]).tolist(), (3, 4)),
    ("ignore_eos", np.bool_(True), True),
    ("skip_special_tokens", np.array([True, False])[1], False),
]  # fmt: skip
TYPES: dict[str, tuple[type, ...]] = {
    "n": (int,), "top_k": (int,), "min_tokens": (int,),
    "seed": (int, type(None)), "max_tokens": (int, type(None)),
    "logprobs": (int, type(None)), "prompt_logprobs": (int, type(None)),
    "temperature": (float,), "top_p": (float,), "min_p": (float,),
    "presence_penalty": (float,), "frequency_penalty": (float,), "repetition_penalty": (float,),
    "stop": (tuple,), "stop_token_ids": (tuple,), "logit_bias": (dict,),
    "ignore_eos": (bool,), "skip_special_tokens": (bool,), "kept_special_tokens": (frozenset,),
    "structured_outputs": (StructuredOutputsParams, type(None)),
}  # fmt: skip


def assert_declared_types(params: SamplingParams) -> None:
    """Exactly these types, not subclasses: torch and msgspec tell 1 from 1.0."""
    assert {field.name for field in fields(params)} == set(TYPES)
    for name, kinds in TYPES.items():
        assert type(getattr(params, name)) in kinds, name
    assert {type(text) for text in params.stop} <= {str}
    assert {type(token) for token in params.stop_token_ids} <= {int}
    assert {type(token) for token in params.kept_special_tokens} <= {int}
    assert {type(token) for token in params.logit_bias} <= {int}
    assert {type(bias) for bias in params.logit_bias.values()} <= {float}


@pytest.mark.parametrize(("field", "given_value", "want"), GIVEN)
def test_values_are_converted_to_the_declared_types(
    field: str, given_value: Any, want: Any
) -> None:
    params = SamplingParams(**{field: given_value})
    assert getattr(params, field) == want
    assert_declared_types(params)
    assert_declared_types(replace(params, n=2, kept_special_tokens=[np.int32(3)]))


def test_options_hold_plain_types() -> None:
    options = RequestOptions(priority=np.int32(-3))
    assert options.priority == -3 and type(options.priority) is int


def test_the_bias_is_a_copy() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 200.0
    assert params.logit_bias == {3: 1.0}
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]


# name: (lowest, highest, integers only, None allowed)
NUMBERS: dict[str, tuple[float, float, bool, bool]] = {
    "n": (1, 64, True, False),
    "temperature": (0, 2, False, False),
    "top_p": (5e-324, 1, False, False),
    "min_p": (0, 1, False, False),
    "top_k": (-1, 2**31 - 1, True, False),
    "seed": (-(2**63), 2**63 - 1, True, True),
    "max_tokens": (1, 2**31 - 1, True, True),
    "min_tokens": (0, 2**31 - 1, True, False),
    "logprobs": (0, 20, True, True),
    "prompt_logprobs": (0, 20, True, True),
    "presence_penalty": (-2, 2, False, False),
    "frequency_penalty": (-2, 2, False, False),
    "repetition_penalty": (5e-324, 10, False, False),
}
VALUES = st.one_of(
    st.integers(-3, 70),
    st.floats(-3, 12),
    st.integers(),
    st.floats(),
    st.sampled_from([HUGE, -HUGE, 2**31, 2**63, -(2**63), math.nan, math.inf, 1e-310]),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.complex_numbers(),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.integers(), st.floats(), max_size=3),
)


@given(st.sampled_from(sorted(NUMBERS)), VALUES)
def test_numbers_are_taken_in_bounds_and_refused_by_name(field: str, value: Any) -> None:
    low, high, whole, none = NUMBERS[field]
    kind = type(value) in ((int,) if whole else (int, float))
    if (value is None and none) or (kind and low <= value <= high):
        params = SamplingParams(**{"max_tokens": None, field: value})
        assert getattr(params, field) == value
        return
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{"max_tokens": None, field: value})
    assert caught.value.param == field
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


@given(st.sampled_from([f.name for f in fields(SamplingParams)]), VALUES)
def test_nothing_but_a_request_error_comes_of_any_value(field: str, value: Any) -> None:
    try:
        params = SamplingParams(**{field: value})
    except RequestError as err:
        assert err.param == field
        assert len(str(err)) < 120 and "\n" not in str(err)
    else:
        assert replace(params) == params, "what was accepted is accepted again"
        assert_declared_types(params)


def test_min_tokens_without_max_tokens() -> None:
    assert SamplingParams(min_tokens=10**6, max_tokens=None).min_tokens == 10**6


def test_params_are_frozen_and_by_keyword() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.temperature = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]
