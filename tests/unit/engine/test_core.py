"""Rank 0's engine over a scheduler, with tokens from a script: text, ends and failures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_cp.engine.core import EngineCore
from ds_cp.errors import RequestError
from ds_cp.outputs import Delta
from ds_cp.plan import Outcome, Sampled
from ds_cp.sampling_params import SamplingParams
from tests.helpers.cluster import Cluster

BROKEN = 5  # a token that the tokenizer cannot decode


class BrokenTokenizer:
    """One token a byte; its decode raises for one token."""

    def __init__(self) -> None:
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        self._whole = PreTrainedTokenizerFast(tokenizer_object=core)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def decode(self, ids: list[int], **rest: Any) -> str:
        if BROKEN in ids:
            raise KeyError("no such piece")
        text: str = self._whole.decode(ids, **rest)
        return text

    def ids(self, text: str) -> list[int]:
        return list(self._whole(text)["input_ids"])


@pytest.fixture
def tokenizer() -> BrokenTokenizer:
    return BrokenTokenizer()


@pytest.fixture
def core(tokenizer: BrokenTokenizer) -> EngineCore:
    return EngineCore(Cluster([64], 4).scheduler, tokenizer)


def run(core: EngineCore, script: Mapping[str, Sequence[int]]) -> dict[str, list[Delta]]:
    """Run to the end; request ``name`` draws ``script[name]``, token by token."""
    names = {request.number: request.request_id for request in core.scheduler.waiting}
    ahead = {name: iter(tokens) for name, tokens in script.items()}
    deltas: dict[str, list[Delta]] = {name: [] for name in script}
    for _ in range(200):
        if not core.has_work:
            break
        plan = core.plan()
        assert plan is not None
        drawn = [chunk.request for chunk in plan.chunks if chunk.samples]
        drawn += [number for decodes in plan.decodes for number in decodes.requests]
        tokens = [Sampled(number, next(ahead[names[number]]), -1.0) for number in drawn]
        for delta in core.apply(Outcome(plan.step, tuple(tokens))):
            deltas[delta.request_id].append(delta)
    assert not core.has_work
    core.check_integrity()
    return deltas


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


# --- one request's text is one request's fault


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_token_that_cannot_be_decoded_ends_one_request(
    core: EngineCore, tokenizer: BrokenTokenizer, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    """At the first token, in the middle, and at the last one, after which it would have ended."""
    good, bad = tokenizer.ids("good"), tokenizer.ids("baad")
    bad[at] = BROKEN
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    (first,) = core.add("good", [9, 10], params)
    (second,) = core.add("bad", [9, 11], params)
    (third,) = core.add("also good", [9, 12], params)
    with caplog.at_level(logging.ERROR):
        deltas = run(core, {"good": good, "bad": bad, "also good": good})
    assert text_of(deltas["good"]) == text_of(deltas["also good"]) == "good"
    assert [deltas[name][-1].finish_reason for name in ("good", "also good")] == ["length"] * 2
    assert text_of(deltas["bad"]) == "baad"[:at]
    assert [delta.finish_reason for delta in deltas["bad"]] == [None] * at + ["error"]
    assert (first.finish_reason, second.finish_reason) == ("length", "error")
    assert third.finish_reason == "length"
    assert core.stats().finished == {"length": 2, "error": 1}
    assert "request bad" in caplog.text and "token 5" in caplog.text
    # The engine goes on with other requests.
    core.add("next", [9, 13], params)
    assert text_of(run(core, {"next": good})["next"]) == "good"


def test_a_prompt_that_cannot_be_decoded_is_refused(core: EngineCore) -> None:
    with pytest.raises(RequestError, match="cannot decode the prompt .KeyError") as caught:
        core.add("bad", [9, BROKEN], SamplingParams())
    assert caught.value.param == "prompt"
    assert not core.has_work and core.stats().num_requests_waiting == 0
    core.add("bad", [9, 10], SamplingParams(max_tokens=1))  # its name is free


# --- stop strings and min_tokens


@pytest.mark.parametrize("min_tokens", range(9))
@pytest.mark.parametrize("stop", [("X",), ("bX",), ("X", "cX"), ("q",)])
def test_stop_strings_wait_for_min_tokens(
    core: EngineCore, tokenizer: BrokenTokenizer, min_tokens: int, stop: tuple[str, ...]
) -> None:
    """As vLLM: a stop string counts when its last token has ``min_tokens`` before it."""
    whole = "aXbXcXdX"
    want, reason, by = whole, "length", None
    for count in range(min_tokens + 1, len(whole) + 1):
        found = [(count - len(s), s) for s in stop if whole[:count].endswith(s)]
        if found:
            at, by = min(found)
            want, reason = whole[:at], "stop"
            break
    params = SamplingParams(max_tokens=len(whole), min_tokens=min_tokens, stop=stop)
    core.add("one", [9, 10], params)
    deltas = run(core, {"one": tokenizer.ids(whole)})["one"]
    assert text_of(deltas) == want
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (reason, by)


# --- the text goes on where the prompt ends


def test_text_offsets_and_the_prompt(core: EngineCore, tokenizer: BrokenTokenizer) -> None:
    """A character of the prompt's bytes and the answer's; offsets count the answer's characters."""
    spelled = tokenizer.ids("a€🙂b€c")
    params = SamplingParams(max_tokens=len(spelled) - 2, logprobs=0, stop=("zz",))
    core.add("one", spelled[:2], params)
    deltas = run(core, {"one": spelled[2:]})["one"]
    assert text_of(deltas) == "€🙂b€c"
    offsets = [delta.logprobs[0].text_offset for delta in deltas if delta.logprobs]
    assert offsets == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 4]


def test_how_far_a_prompt_has_come() -> None:
    """From its first step to its first token; a request that waits, or is not there, has none."""
    cluster = Cluster([64], 4, budget=16)
    core = EngineCore(cluster.scheduler, None)
    core.add("a", list(range(40)), SamplingParams(max_tokens=2))
    assert core.progress("a") is None and core.progress("b") is None
    found = []
    while (plan := core.plan()) is not None:
        progress = core.progress("a")
        assert progress is not None and (progress.total, progress.cached) == (40, 0)
        assert progress.seconds >= 0
        found.append(progress.processed)
        drawn = [Sampled(chunk.request, 7, -1.0) for chunk in plan.chunks if chunk.samples]
        core.apply(Outcome(plan.step, tuple(drawn)))
        if drawn:
            break
    assert found == sorted(found) and len(found) > 1 and found[-1] == 40
    assert core.progress("a") is None
