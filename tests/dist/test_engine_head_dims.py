"""Models whose values have another head dim than their keys, spread over two ranks in every
spanning mode: the tokens of transformers' eager attention, with their log-probabilities."""

from __future__ import annotations

import torch

from ds_cp.comm.wire import World
from ds_cp.sampling_params import SamplingParams
from tests.helpers.engines import engine_on
from tests.helpers.head_dims import VOCAB, make_model
from tests.helpers.ranks import run_ranks

SERVED = ("DeepseekV3", "Glm4MoeLite", "MiniCPM3", "MiMoV2Flash", "LongcatFlash")
MODES = (("tree", "auto"), ("ring", "kv"), ("ring", "q"))
LENGTHS = (5, 50)  # the second spans two ranks of 36 tokens
NEW = 6
LIMIT = 1e-4  # of a log-probability

Answer = list[tuple[int, float]]  # each token and its log-probability


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def serve(world: World) -> dict[tuple[str, tuple[str, str]], list[Answer]]:
    found = {}
    for family in SERVED:
        model = make_model(family)
        for mode in MODES:
            engine = engine_on(world, model, {
                "context_parallel": {"mode": mode[0], "ring_pass": mode[1]},
                "kv_cache": {"block_size": 4, "tokens_per_rank": 36},
            })  # fmt: skip
            params = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=1, ignore_eos=True)
            outputs = engine.generate(prompts(), params)
            if outputs:
                assert outputs[-1].metrics.modes == (mode[0],)
                assert engine.facts.num_kv_heads == (3 if family == "MiMoV2Flash" else 4)
            found[family, mode] = [
                [(drawn.token_id, drawn.logprob) for drawn in output.outputs[0].logprobs or ()]
                for output in outputs
            ]
    return found


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
    found, *_ = run_ranks(serve, 2, timeout=120)
    for family in SERVED:
        want = answers(family)
        for mode in MODES:
            for got, expected in zip(found[family, mode], want, strict=True):
                assert [t for t, _ in got] == [t for t, _ in expected], (family, mode)
                errors = [abs(a - b) for (_, a), (_, b) in zip(got, expected, strict=True)]
                assert max(errors) < LIMIT, (family, mode)
