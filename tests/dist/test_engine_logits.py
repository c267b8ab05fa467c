"""Logits of random small models of many families, in every mode on three ranks, against eager
transformers on one process: largest difference <= 1e-3 at fp32, in prefill and in decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from ds_cp.comm.wire import World
from ds_cp.worker import worker as worker_module
from ds_cp.sampling_params import SamplingParams
from ds_cp.plan import Sampled
from ds_cp.worker.sampler import Row
from tests.helpers.engines import engine_on
from tests.helpers.ranks import run_ranks

Ids = tuple[int, ...]
LIMIT = 1e-3
MODES = (("auto", "auto"), ("local", "auto"), ("ring", "kv"), ("ring", "q"), ("tree", "auto"))
LENGTHS = (1, 13, 90)  # the last spans three ranks of 32 tokens
NEW = 5
WINDOW = 16

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ALTERNATING,
         "query_pre_attn_scalar": 24},
    ),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ALTERNATING,
         "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 30.0},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
         "decoder_sparse_step": 1},
    ),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
         "sliding_window": WINDOW, "layer_types": ALTERNATING, "rope_parameters": {
             "rope_type": "default", "rope_theta": 10000.0}},
    ),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
}  # fmt: skip


def make_model(family: str) -> PreTrainedModel:
    """Random weights, the same on every rank. Norms, biases and sinks are random too, so that
    leaving one out would show."""
    name, changes = FAMILIES[family]
    text = "TextConfig" if family == "gemma3" else "Config"
    config = getattr(hf, name + text)(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    model = getattr(hf, name + "ForCausalLM")(config).eval().float()
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def prompts() -> list[Ids]:
    generator = torch.Generator().manual_seed(3)
    return [
        tuple(torch.randint(1, 128, (length,), generator=generator).tolist()) for length in LENGTHS
    ]


class Recorder:
    """Stands in for the worker's ``sample_rows``: keeps the logits, and always says the next token
    of a fixed walk, so that every mode and transformers see the same sequence."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, logits_RV: torch.Tensor, rows: Sequence[Row]) -> list[Sampled]:
        assert len(rows) == len(logits_RV)
        drawn = []
        for row, logits_V in zip(rows, logits_RV, strict=True):
            assert (row.request, row.index) not in self.seen, "drawn twice"
            self.seen[row.request, row.index] = logits_V.clone()
            drawn.append(Sampled(row.request, walk(row.index), 0.0))
        return drawn


def walk(index: int) -> int:
    return (37 * index + 11) % 128


def record(
    world: World, families: list[str]
) -> dict[tuple[str, tuple[str, str]], dict[tuple[int, int], list[float]]]:
    """(family, mode) -> (prompt, index of the new token) -> logits, of those sampled here."""
    found = {}
    for family in families:
        model = make_model(family)
        for mode in MODES:
            recorder = worker_module.sample_rows = Recorder()  # type: ignore[assignment]
            engine = engine_on(world, model, {
                "context_parallel": {"mode": mode[0], "ring_pass": mode[1]},
                "kv_cache": {
                    "block_size": 4, "tokens_per_rank": 128 if mode[0] == "local" else 36,
                },
            })  # fmt: skip
            outputs = engine.generate(prompts(), SamplingParams(max_tokens=NEW))
            for output in outputs:
                assert output.outputs[0].token_ids == tuple(walk(i) for i in range(NEW))
            if outputs and mode[0] != "local":
                spanning = ("ring", "tree") if mode[0] == "auto" else (mode[0],)
                assert outputs[-1].metrics.modes == spanning
            found[family, mode] = {
                (request - 1, index): logits.tolist()
                for (request, index), logits in recorder.seen.items()
            }
    return found


@torch.inference_mode()
def reference(family: str) -> dict[tuple[int, int], torch.Tensor]:
    model = make_model(family)
    want = {}
    for n, prompt in enumerate(prompts()):
        ids = [*prompt, *(walk(i) for i in range(NEW - 1))]
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        for index in range(NEW):
            want[n, index] = logits[len(prompt) - 1 + index]
    return want


def worst_difference(
    want: dict[tuple[int, int], torch.Tensor], got: dict[tuple[int, int], torch.Tensor]
) -> float:
    assert got.keys() == want.keys(), "every prompt's last position and every decode step, once"
    return max(float((got[key] - want[key]).abs().max()) for key in want)


@pytest.mark.parametrize("size", [3])
def test_logits_equal_transformers(size: int) -> None:
    results = run_ranks(record, size, list(FAMILIES), timeout=250)
    bad = []
    for family in FAMILIES:
        want = reference(family)
        scale = max(float(logits.abs().max()) for logits in want.values())
        assert scale > 0.5, f"{family}: logits of {scale} show nothing"
        for mode in MODES:
            pieces = [result[family, mode] for result in results]
            assert sum(map(len, pieces)) == len(want), "each is sampled on one rank only"
            got = {key: torch.tensor(row) for piece in pieces for key, row in piece.items()}
            error = worst_difference(want, got)
            if not error <= LIMIT:
                bad.append(f"{family} {mode}: {error:.2e}")
    assert not bad


def test_windows_caps_and_sinks_matter() -> None:
    """The references change when one is taken away, so the test above would see it missing."""
    for family, changes in {
        "mistral": {"sliding_window": None},
        "gemma2": {"attn_logit_softcapping": None},
        "gemma3": {"layer_types": ["full_attention", "full_attention"]},
    }.items():
        want = reference(family)
        name, original = FAMILIES[family]
        FAMILIES[family] = (name, {**original, **changes})
        try:
            assert worst_difference(want, reference(family)) > 10 * LIMIT, family
        finally:
            FAMILIES[family] = (name, original)
    whole = reference("gpt_oss")
    model = make_model("gpt_oss")
    ids = torch.tensor([prompts()[-1]])
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e9)
    with torch.inference_mode():
        without = model(ids, use_cache=False).logits[0, -1]
    assert float((without - whole[len(LENGTHS) - 1, 0]).abs().max()) > 10 * LIMIT
