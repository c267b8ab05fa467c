"""Models whose values have another head dim than their keys, spread over two ranks in every
spanning mode: the tokens of transformers' eager attention, with their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_cp.comm.wire import World
from ds_cp.outputs import RequestOutput
from ds_cp.sampling_params import SamplingParams
from tests.helpers.engines import engine_on
from tests.helpers.head_dims import VOCAB, make_model
from tests.helpers.ranks import run_ranks

SERVED = ("DeepseekV3", "Glm4MoeLite", "MiniCPM3", "MiMoV2Flash")
SPLIT = ("Glm4MoeLite", "MiMoV2Flash")  # also with tensor parallelism; the second has sinks
MODES = (("tree", "auto"), ("ring", "kv"), ("ring", "q"))
# Served in the first mode only, to be quick; the last has two attentions a layer.
ONCE = ("DeepseekV2", "AXK1", "Youtu", "LongcatFlash")
LENGTHS = (5, 50)  # the second spans two ranks of 36 tokens
NEW = 6
LIMIT = 1e-4  # of a log-probability

Answer = list[tuple[int, float]]  # each token and its log-probability


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def serve(world: World) -> dict[tuple[str, str], list[Answer]]:
    """(family, how it was served) -> the answers, on rank 0."""
    found = {}
    params = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=1, ignore_eos=True)
    for family in (*SERVED, *ONCE):
        model = make_model(family)
        for mode, ring_pass in MODES[: 1 if family in ONCE else None]:
            engine = engine_on(world, model, {
                "context_parallel": {"mode": mode, "ring_pass": ring_pass},
                "kv_cache": {"block_size": 4, "tokens_per_rank": 36},
            })  # fmt: skip
            outputs = engine.generate(prompts(), params)
            if outputs:
                assert outputs[-1].metrics.modes == (mode,)
                assert engine.facts.num_kv_heads == (3 if family == "MiMoV2Flash" else 4)
            found[family, f"{mode} {ring_pass}"] = told(outputs)
    for family in SPLIT:
        engine = engine_on(world, make_model(family), {
            "tensor_parallel": {"tp_size": 2}, "kv_cache": {"block_size": 4, "tokens_per_rank": 64},
        })  # fmt: skip
        found[family, "two halves of each layer"] = told(engine.generate(prompts(), params))
    return found


def told(outputs: Sequence[RequestOutput]) -> list[Answer]:
    return [
        [(drawn.token_id, drawn.logprob) for drawn in output.outputs[0].logprobs or ()]
        for output in outputs
    ]


@torch.inference_mode()
def answers(family: str) -> list[Answer]:
    model, found = make_model(family), []
    for prompt in prompts():
        ids, answer = list(prompt), []
        for _ in range(NEW):
            logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            ids.append(int(logprobs.argmax()))
            answer.append((ids[-1], float(logprobs[ids[-1]])))
        found.append(answer)
    return found


def test_tokens_are_those_of_transformers() -> None:
    found, _ = run_ranks(serve, 2, timeout=120)
    want = {family: answers(family) for family in (*SERVED, *ONCE)}
    assert len(found) == len(SERVED) * len(MODES) + len(ONCE) + len(SPLIT)
    for (family, how), got in found.items():
        for mine, expected in zip(got, want[family], strict=True):
            assert [t for t, _ in mine] == [t for t, _ in expected], (family, how)
            errors = [abs(a - b) for (_, a), (_, b) in zip(mine, expected, strict=True)]
            assert max(errors) < LIMIT, (family, how)
