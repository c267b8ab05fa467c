"""Bounds of the sampling parameters; each refusal names its field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ds_cp.engine.params import SamplingParams
from ds_cp.errors import RequestError

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.01),
    ("temperature", 2.01),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", None),
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
    ("stop", ("",)),
    ("stop", ""),
    ("stop", ("x" * 257,)),
    ("stop", tuple("abcdefghijklmnopq")),  # 17
    ("stop", (3,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (2**31,)),
    ("stop_token_ids", ("a",)),
    ("stop_token_ids", tuple(range(301))),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", {5: -100.5}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {5: "much"}),
    ("logit_bias", dict.fromkeys(range(301), 0.5)),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{f}-{str(v)[:20]}" for f, v in BAD])
def test_out_of_bounds_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
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


def test_min_tokens_without_max_tokens() -> None:
    assert SamplingParams(min_tokens=10**6, max_tokens=None).min_tokens == 10**6


def test_params_are_frozen_and_by_keyword() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.temperature = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]
