"""What makes two models the same, and which rank is called odd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_cp.model.source import ModelSource
from ds_cp.startup.fingerprint import PARTS, describe_difference, fingerprint
from tests.helpers.engines import tiny_llama
from tests.helpers.tiny import make_tiny_model

HOSTS = ["a", "a", "b", "b", "c"]
SAME = ("c", "s", "w", "t")


def differs(first: tuple[str, ...], second: tuple[str, ...]) -> list[str]:
    return [part for part, x, y in zip(PARTS, first, second, strict=True) if x != y]


def changed(model: Any, change: Callable[[Any], None]) -> Any:
    change(model)
    return model


def test_the_same_model_twice() -> None:
    assert fingerprint(tiny_llama(), None) == fingerprint(tiny_llama(), None)
    moved = tiny_llama()
    moved.config.name_or_path = "/another/folder"
    assert fingerprint(moved, None) == fingerprint(tiny_llama(), None)


def test_strides_do_not_matter() -> None:
    model = tiny_llama()
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(weight.data.T.contiguous().T)
    assert not model.lm_head.weight.is_contiguous()
    assert fingerprint(model, None) == fingerprint(tiny_llama(), None)


def test_computed_buffers_may_differ_in_the_last_bit() -> None:
    """1e6 ** x has other last bits on a CPU without AVX2 than on one with it."""
    model = tiny_llama()
    frequencies = model.model.rotary_emb.inv_freq
    frequencies.copy_(torch.nextafter(frequencies, torch.zeros_like(frequencies)))
    assert fingerprint(model, None) == fingerprint(tiny_llama(), None)


def last_element(model: Any) -> None:
    model.lm_head.weight.data[-1, -1] += 1e-6


def end_token(model: Any) -> None:
    model.generation_config.eos_token_id = 5


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq[0] *= 2


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (lambda: tiny_llama(seed=12), ["weights"]),
        (lambda: changed(tiny_llama(), last_element), ["weights"]),
        (lambda: changed(tiny_llama(), buffer), ["weights"]),
        (lambda: changed(tiny_llama(), end_token), ["config"]),
        (lambda: tiny_llama(rms_norm_eps=1e-5), ["config"]),
        (lambda: tiny_llama(num_hidden_layers=3), ["config", "tensor shapes", "weights"]),
        (lambda: tiny_llama().to(torch.bfloat16), ["tensor shapes", "weights"]),
    ],
)
def test_what_makes_models_differ(other: Callable[[], Any], parts: list[str]) -> None:
    found = differs(fingerprint(tiny_llama(), None), fingerprint(other(), None))
    assert [part for part in found if part in parts] == parts
    assert set(found) <= {*parts, "config"}


def test_tokenizer_files(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    source, model = ModelSource("directory", str(folder)), tiny_llama()
    before = fingerprint(model, source)
    (folder / "README.md").write_text("says nothing")
    assert fingerprint(model, source) == before
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert differs(before, fingerprint(model, source)) == ["tokenizer"]
    assert fingerprint(model, ModelSource("hub", "owner/name"))[3] == ""


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({}, None),
        ({3: ("c", "s", "W", "t")}, "rank 3 on b loaded another model than the other 4 ranks "
         "(weights differ): copy the same model to every host"),
        ({0: ("C", "s", "w", "t")}, "rank 0 on a loaded another model than the other 4 ranks "
         "(config differs): copy the same model to every host"),
        ({1: ("c", "s", "w", "T"), 4: ("c", "s", "w", "U")}, "rank 1 on a, rank 4 on c loaded "
         "another model than the other 3 ranks (tokenizer differs): "
         "copy the same model to every host"),
        ({2: ("c", "s", "w", ""), 3: ("c", "s", "w", "")}, None),  # hosts without a tokenizer
    ],
)  # fmt: skip
def test_the_odd_ranks_are_named(odd: dict[int, tuple[str, ...]], words: str | None) -> None:
    assert describe_difference([odd.get(rank, SAME) for rank in range(5)], HOSTS) == words


def test_where_no_side_is_larger_all_are_named() -> None:
    other = ("c", "s", "W", "t")
    found = describe_difference([SAME, other, other, SAME], ["a", "a", "b", "b"])
    assert found == (
        "rank 0 on a, rank 3 on b and rank 1 on a, rank 2 on b loaded models that differ in their "
        "weights: copy the same model to every host"
    )
