"""Constrained answers on 1 to 3 ranks are token for token what one process says.

The references come from transformers' logits, the masks of ``Matcher`` (which has its own test) and
the sampler (which has its own test too), one request at a time in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_cp.comm.wire import World
from ds_cp.engine.collect import PromptRequest
from ds_cp.engine.llm import LLMEngine
from ds_cp.errors import RequestError
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.lark import HEADER
from ds_cp.grammar.checker import tokenizer_json
from ds_cp.grammar.matcher import Compiler
from ds_cp.grammar.compile_process import vocabulary_of
from ds_cp.outputs import RequestOutput
from ds_cp.plan import Sampling
from ds_cp.sampling_params import SamplingParams
from ds_cp.worker.history import History
from ds_cp.worker.sampler import Row, sample_rows
from tests.helpers.engines import engine_on
from tests.helpers.ranks import run_ranks
from tests.helpers.schemas import Schema
from tests.helpers.tiny import EOS, LONG, make_tiny_model

Ids = tuple[int, ...]
Wish = tuple[str, SamplingParams]  # a prompt and how it is answered
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "né", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GREEDY: dict[str, Any] = {"temperature": 0.0}
WARM: dict[str, Any] = {"temperature": 1.3, "top_k": 40}
LETTER_A = sorted(ByteLevel.alphabet()).index("a")  # its token
MODES = (("auto", "auto"), ("ring", "kv"), ("ring", "q"), ("tree", "auto"))


def wish(prompt: str, how: dict[str, Any], max_tokens: int = 120, **kind: Any) -> Wish:
    more = {"max_tokens": max_tokens, "seed": 5, **how}
    return prompt, SamplingParams(structured_outputs=StructuredOutputsParams(**kind), **more)


WISHES: list[Wish] = [
    wish("Hello", GREEDY, json=PERSON, disable_any_whitespace=True),
    wish("Hello", WARM, json=PERSON, disable_any_whitespace=True),
    wish(LONG, WARM, json=PERSON),
    wish("Pick", {**WARM, "logprobs": 3}, choice=["yes", "no", "né"]),
    wish("A number", {**WARM, "repetition_penalty": 1.3, "top_p": 0.9}, regex="[0-9]{3,6}(px|%)"),
    wish(LONG, {**WARM, "frequency_penalty": 0.7, "min_p": 0.02}, regex="(la|le|lu){4,9}!"),
    wish("List", GREEDY, grammar='root ::= d ("," d){2,5}\nd ::= [0-9]{2}'),
    wish("Cut", WARM, max_tokens=9, json=PERSON),
    wish("Stop", {**WARM, "stop_token_ids": [LETTER_A]}, regex="[ab]{3}c[ab]{0,2}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny")))


@torch.inference_mode()
def reference(folder: str, wishes: Sequence[Wish]) -> list[Ids]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compiler = Compiler(vocabulary_of(tokenizer_json(tokenizer)))
    found = []
    for prompt, params in wishes:
        assert params.structured_outputs is not None and params.max_tokens is not None
        source = params.structured_outputs.source
        if params.structured_outputs.is_foreign:
            source = HEADER + 'start: D ("," D){2,5}\nD: /[0-9]{2}/'
        matcher = compiler.compile(source)
        ends = frozenset({EOS, *params.stop_token_ids})
        how = Sampling(
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            min_p=params.min_p, seed=params.seed or 0, frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
        )  # fmt: skip
        ids = tokenizer(prompt)["input_ids"]
        output: list[int] = []
        while len(output) < params.max_tokens and not ends & set(output[-1:]):
            logits = model(torch.tensor([[*ids, *output]])).logits[0, -1:]
            row = Row(0, len(output), how, History(ids, output), matcher.allowed(ends))
            output.append(sample_rows(logits, [row])[0].token)
            matcher.advance(output[-1:], ends)
        found.append(tuple(output))
    return found


@pytest.fixture(scope="module")
def want(folder: str) -> list[Ids]:
    return reference(folder, WISHES)


def reason_of(asked: Wish, tokens: Ids) -> str:
    return "stop" if tokens[-1] in (EOS, *asked[1].stop_token_ids) else "length"


def make_engine(
    world: World, folder: str, tokens: int, mode: tuple[str, str] = ("auto", "auto"), **more: Any
) -> LLMEngine:
    cp = {"mode": mode[0], "ring_pass": mode[1]}
    kv = {"block_size": 4, "tokens_per_rank": tokens}
    return engine_on(world, folder, {"context_parallel": cp, "kv_cache": kv, **more})


def generate(engine: LLMEngine, wishes: Sequence[Wish]) -> list[RequestOutput]:
    return engine.generate([prompt for prompt, _ in wishes], [params for _, params in wishes])


def tokens_of(outputs: Sequence[RequestOutput]) -> list[Ids]:
    return [output.outputs[0].token_ids for output in outputs]


# --- the same tokens as transformers, in every mode


def same_tokens(world: World, folder: str, want: list[Ids]) -> list[str]:
    """Rank 0 says what differs. Chunks are small, so that prompts take several."""
    bad: list[str] = []
    for mode in MODES if world.size > 1 else MODES[:1]:
        engine = make_engine(
            world, folder, 2000 // world.size, mode, scheduler={"max_num_batched_tokens": 24}
        )
        outputs = generate(engine, WISHES)
        if world.rank:
            continue
        got = tokens_of(outputs)
        bad += [
            f"{mode} wish {n}: {a} not {b}" for n, (a, b) in enumerate(zip(got, want)) if a != b
        ]
        ends = [output.outputs[0].finish_reason for output in outputs]
        assert ends == [reason_of(*pair) for pair in zip(WISHES, want, strict=True)]
        assert ends.count("stop") >= 6 and ends[7] == "length"
        assert outputs[8].outputs[0].stop_reason in (LETTER_A, None)
        _allowed_logprobs(outputs[3])
    return bad


def _allowed_logprobs(output: RequestOutput) -> None:
    """They are of the allowed tokens: their probabilities sum to 1 where all are listed."""
    for item in output.outputs[0].logprobs or ():
        assert 1 <= len(item.top) <= 3 and all(value > -1e9 for _, value in item.top)
        total = sum(torch.tensor([value for _, value in item.top]).exp().tolist())
        assert total == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_constrained_tokens_equal_transformers(size: int, folder: str, want: list[Ids]) -> None:
    results = run_ranks(same_tokens, size, folder, want, timeout=200)
    assert not results[0]


# --- preemption, forks, moves


def preempted(world: World, folder: str, want: list[Ids]) -> None:
    """Many more than fit: what is preempted is computed again, and its state made again."""
    wishes = [w for n, w in enumerate(WISHES) if n not in (2, 5)] * 3
    expected = [w for n, w in enumerate(want) if n not in (2, 5)] * 3
    engine = make_engine(world, folder, -(-160 // world.size // 4) * 4)
    outputs = generate(engine, wishes)
    if world.rank == 0:
        assert tokens_of(outputs) == expected
        assert sum(output.metrics.num_preemptions for output in outputs) > 0


def forked(world: World, folder: str) -> None:
    """Each of n answers is what a request with its seed alone says."""
    engine = make_engine(world, folder, 2000)
    one = wish("Hello", WARM, json=PERSON)
    (together,) = generate(engine, [wish("Hello", {**WARM, "n": 3}, json=PERSON)]) or [None]
    alone = generate(
        engine, [wish("Hello", {**WARM, "seed": 5 + n}, json=PERSON) for n in range(3)]
    )
    if together is not None:
        assert [answer.token_ids for answer in together.outputs] == tokens_of(alone)
        assert len({answer.token_ids for answer in together.outputs}) == 3
        assert tokens_of(alone)[0] == tokens_of(generate(engine, [one]))[0]
    else:
        generate(engine, [one])


def moved(world: World, folder: str, want: list[Ids]) -> None:
    """Requests go on while their ranks are drained one after the other: draws change ranks."""
    engine = make_engine(world, folder, 3000)
    requests = [PromptRequest(str(n), *w) for n, w in enumerate(WISHES)]
    got: dict[int, Ids] = {}
    drained = 0
    for output in engine.stream(requests):
        assert isinstance(output, RequestOutput), output
        got[int(output.request_id)] = output.outputs[0].token_ids
        if len(got) in (1, 3, 5):
            if len(got) > 1:
                engine.reopen(drained)
            drained = (drained + 1) % world.size
            engine.drain(drained)
    if world.rank == 0:
        assert [got[n] for n in range(len(WISHES))] == want
        assert engine._core is not None and engine._core.stats().blocks_moved > 0


def lives(world: World, folder: str, want: list[Ids]) -> None:
    preempted(world, folder, want)
    forked(world, folder)
    if world.size > 1:
        moved(world, folder, want)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_preemption_forks_and_moves(size: int, folder: str, want: list[Ids]) -> None:
    run_ranks(lives, size, folder, want, timeout=200)


# --- what goes wrong


def failing_ones(world: World, folder: str, want: list[Ids]) -> None:
    """A grammar that allows no token, here because the only one is a stop token, ends its own
    request, and one that cannot be kept is refused before anything runs."""
    engine = make_engine(world, folder, 8000)
    dead_end = wish("x", {**WARM, "stop_token_ids": [LETTER_A]}, regex="ba{5}")
    outputs = generate(engine, [WISHES[0], dead_end, WISHES[3]])
    if world.rank == 0:
        assert tokens_of(outputs)[::2] == [want[0], want[3]]
        last = outputs[1].outputs[0]
        assert (last.finish_reason, last.stop_reason) == ("error", "structured_outputs")
    bad = wish("x", GREEDY, json={"not": {"type": "string"}})
    if world.rank == 0:
        with pytest.raises(RequestError, match=r'structured_outputs: .*\["not"\]') as caught:
            generate(engine, [WISHES[0], bad])
        assert caught.value.param == "structured_outputs"
    else:
        generate(engine, [])
    outputs = generate(engine, [WISHES[0]])
    assert world.rank or tokens_of(outputs) == want[:1]


def test_a_grammar_that_fails_ends_its_request_alone(folder: str, want: list[Ids]) -> None:
    run_ranks(failing_ones, 2, folder, want, timeout=120)
