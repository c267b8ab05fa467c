"""One table of sampling cases through every door: library, ``ds-cp generate``, ``ds-cp batch`` and
HTTP. The same tokens come out of each, and they are what transformers' ``generate`` says.

Values are as JSON and Python callers write them, integers where numbers are meant included. Each
door's process starts once, for all cases.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.helpers.jobs import START_S, Job, command, ds_cp, json_lines, post
from tests.helpers.tiny import EOS

PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
DRAWN: dict[str, Any] = {"temperature": 1, "max_tokens": 8, "seed": 7}
CLEAR = 1e-3  # least gap of the two best scores of each greedy step: rounding cannot decide

# Sampling fields as JSON, by the name of the case.
CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "temperature 0.0": GREEDY | {"temperature": 0.0},
    "one token": GREEDY | {"max_tokens": 1},
    "bias int": GREEDY | {"logit_bias": {"65": 100}},
    "bias float": GREEDY | {"logit_bias": {"65": 100.0}},
    "bias ban": GREEDY | {"logit_bias": {str(token): -100 for token in range(40)}},
    "bias mixed": GREEDY | {"logit_bias": {"65": 5, "66": 4.5, "67": -3}},
    "repetition int": GREEDY | {"repetition_penalty": 2},
    "repetition float": GREEDY | {"repetition_penalty": 1.3},
    "presence int": GREEDY | {"presence_penalty": 2, "logit_bias": {"65": 9}},
    "frequency int": GREEDY | {"frequency_penalty": 2, "logit_bias": {"65": 9}},
    "penalties": GREEDY
    | {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.2},
    "end": GREEDY | {"logit_bias": {str(EOS): 100}},
    "ignore_eos": GREEDY | {"logit_bias": {str(EOS): 100}, "ignore_eos": True},
    "min_tokens": GREEDY | {"logit_bias": {str(EOS): 100}, "min_tokens": 3},
    "min_tokens all": GREEDY | {"logit_bias": {str(EOS): 100}, "min_tokens": 8},
    "stop ids": GREEDY | {"logit_bias": {"65": 100}, "stop_token_ids": [65, 66]},
    "stop ids late": GREEDY | {"logit_bias": {"65": 100}, "stop_token_ids": [65], "min_tokens": 2},
    "stop string": GREEDY | {"logit_bias": {"65": 100}, "stop": "bb", "max_tokens": 8},
    "stop list": GREEDY | {"logit_bias": {"65": 100}, "stop": ["zz", "bbb"]},
    "stop late": GREEDY | {"logit_bias": {"65": 100}, "stop": ["bb"], "min_tokens": 4},
    "n greedy": GREEDY | {"n": 2},
    "top_k 1": DRAWN | {"top_k": 1},
    "top_k -1": GREEDY | {"top_k": -1},
    "top_p small": DRAWN | {"top_p": 1e-9},
    "min_p int": DRAWN | {"min_p": 1},
    "logprobs": GREEDY | {"logprobs": 3},
    "logprobs biased": GREEDY | {"logprobs": 2, "logit_bias": {"65": 3}},
    # Drawn: the random numbers are ds_cp's own, so transformers says only what may be drawn.
    "drawn": DRAWN,
    "drawn next seed": DRAWN | {"seed": 8},
    "drawn n": DRAWN | {"n": 2},
    "drawn seed below 0": DRAWN | {"seed": -3},
    "drawn top_p int": DRAWN | {"top_p": 1},
    "drawn top_k": DRAWN | {"top_k": 3},
    "drawn top_p": DRAWN | {"top_p": 0.6, "temperature": 2},
    "drawn min_p": DRAWN | {"min_p": 0.2, "temperature": 1.5},
    "drawn all": DRAWN | {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 2},
}
SAMPLED = [name for name in CASES if name.startswith("drawn")]


@dataclass(frozen=True)
class Answer:
    """What a door gave for one choice. ``tokens``: their ids, or their labels of HTTP."""

    tokens: tuple[int | str, ...]
    text: str
    finish_reason: str
    stop_reason: int | str | None
    logprobs: tuple[float, ...] = ()


Door = dict[str, list[Answer]]


# --- the doors


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def config_file(tiny: Path, work: Path) -> str:
    file = work / "config.json"
    file.write_text(json.dumps({
        "model": str(tiny), "dtype": "fp32",
        "kv_cache": {"tokens_per_rank": 512, "block_size": 16},
        "server": {"port": 0, "served_model_name": "tiny"},
    }))  # fmt: skip
    return str(file)


def finished(job: Job) -> str:
    """What a job printed, once it has ended well."""
    try:
        assert job.wait(START_S) == 0, job.story()
        return job.out
    finally:
        job.close()


LIBRARY = """
import dataclasses, json, sys
import ds_cp
engine = ds_cp.init_inference(sys.argv[1], config=sys.argv[2])
names, prompt = json.loads(sys.argv[3]), sys.argv[4]
for fields in names.values():
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
params = [ds_cp.SamplingParams(**fields) for fields in names.values()]
for output in engine.generate([prompt] * len(params), params):
    print(json.dumps(dataclasses.asdict(output)))
engine.shutdown()
"""


def of_outputs(lines: str) -> Door:
    """``RequestOutput`` as JSON lines, in the order of the cases."""
    outputs = json_lines(lines)
    return {
        name: [
            Answer(
                tuple(one["token_ids"]), one["text"], one["finish_reason"], one["stop_reason"],
                tuple(item["logprob"] for item in one["logprobs"] or ()),
            )
            for one in output["outputs"]
        ]
        for name, output in zip(CASES, outputs, strict=True)
    }  # fmt: skip


def through_library(tiny: Path, config_file: str, work: Path) -> Door:
    argv = [sys.executable, "-c", LIBRARY, str(tiny), config_file, json.dumps(CASES), PROMPT]
    return of_outputs(finished(Job(argv, work)))


def through_generate(tiny: Path, config_file: str, work: Path) -> Door:
    file = work / "prompts.jsonl"
    lines = [json.dumps({"prompt": PROMPT} | fields) for fields in CASES.values()]
    file.write_text("\n".join(lines))
    args = ["--config", config_file, "--prompts-file", str(file), "--json"]
    return of_outputs(finished(Job(command("ds-cp", "generate", 1, args), work)))


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """As completion requests, which show their tokens in ``logprobs``."""
    for name, fields in CASES.items():
        yield name, {"model": "tiny", "prompt": PROMPT, "logprobs": 0} | fields


def of_body(body: Mapping[str, Any]) -> list[Answer]:
    return [
        Answer(
            tuple(choice["logprobs"]["tokens"]), choice["text"], choice["finish_reason"],
            choice["stop_reason"], tuple(choice["logprobs"]["token_logprobs"]),
        )
        for choice in body["choices"]
    ]  # fmt: skip


def through_batch(tiny: Path, config_file: str, work: Path) -> Door:
    source, target = work / "batch.jsonl", work / "answers.jsonl"
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
        for name, body in bodies()
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    finished(Job([*ds_cp(), "batch", str(source), str(target), "--config", config_file], work))
    found = {one["custom_id"]: one for one in json_lines(target.read_text())}
    for one in found.values():
        assert one["response"]["status_code"] == 200, one
    return {name: of_body(found[name]["response"]["body"]) for name in CASES}


def through_http(tiny: Path, config_file: str, work: Path) -> Door:
    job = Job(command("ds-cp", "serve", 1, ["--config", config_file]), work)
    try:
        url = job.ready()
        return {name: of_body(post(f"{url}/v1/completions", body)) for name, body in bodies()}
    finally:
        job.close()


DOORS: dict[str, Callable[[Path, str, Path], Door]] = {
    "library": through_library,
    "generate": through_generate,
    "batch": through_batch,
    "http": through_http,
}


@pytest.fixture(scope="module")
def doors(tiny: Path, config_file: str, work: Path) -> dict[str, Door]:
    """What each door gave, by case."""
    return {name: through(tiny, config_file, work) for name, through in DOORS.items()}


# --- what transformers says


class Penalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's presence and frequency penalties, from their definition."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = input_ids[0, self._prompt :].tolist()
        scores = scores.clone()
        for token in set(output):
            scores[0, token] -= self._presence + self._frequency * output.count(token)
        return scores


@dataclass(frozen=True)
class Reference:
    model: Any  # a PreTrainedModel
    tokenizer: Any

    @property
    def prompt(self) -> list[int]:
        return list(self.tokenizer(PROMPT)["input_ids"])

    def greedy(self, fields: Mapping[str, Any]) -> Answer:
        """The best token, again and again."""
        ids, least = self.prompt, fields.get("min_tokens", 0)
        ends = [] if fields.get("ignore_eos") else [EOS, *fields.get("stop_token_ids", [])]
        penalties = Penalties(
            len(ids), fields.get("presence_penalty", 0), fields.get("frequency_penalty", 0)
        )
        bias = {(int(t),): float(b) for t, b in fields.get("logit_bias", {}).items()}
        whole = self.model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=fields["max_tokens"],
            min_new_tokens=least or None, eos_token_id=ends or None, pad_token_id=0,
            sequence_bias=bias or None, logits_processor=LogitsProcessorList([penalties]),
            repetition_penalty=float(fields.get("repetition_penalty", 1.0)),
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for scores in whole.scores:
            best, second = scores[0].topk(2).values.tolist()
            assert best - second > CLEAR, "rounding could decide"
        tokens = whole.sequences[0, len(ids) :].tolist()
        return self.cut(tokens, fields, ends)

    def cut(self, tokens: list[int], fields: Mapping[str, Any], ends: Sequence[int]) -> Answer:
        """The answer that ends at the first stop string with ``min_tokens`` tokens before it."""
        stops = fields.get("stop", ())
        for count in range(fields.get("min_tokens", 0) + 1, len(tokens) + 1):
            text = self.tokenizer.decode(tokens[:count])
            for stop in [stops] if isinstance(stops, str) else stops:
                if text.endswith(stop):  # a token is a byte here
                    return Answer(tuple(tokens[:count]), text.removesuffix(stop), "stop", stop)
        if tokens[-1] in ends:
            reason = tokens[-1] if tokens[-1] != EOS else None
            return Answer(tuple(tokens), self.tokenizer.decode(tokens[:-1]), "stop", reason)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(tuple(tokens), text, "length", None)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of each token of an answer, before it, ``[tokens, vocabulary]``."""
        ids = torch.tensor([[*self.prompt, *tokens]])
        logits: torch.Tensor = self.model(input_ids=ids).logits
        return logits[0, len(self.prompt) - 1 : -1]

    def label(self, token: int) -> str:
        """A token as HTTP shows it: itself, or a byte that is a part of a character."""
        text = str(self.tokenizer.decode([token]))
        if text != "\ufffd":
            return text
        (stand_in,) = self.tokenizer.convert_ids_to_tokens(token)
        plain = {*range(33, 127), *range(161, 173), *range(174, 256)}  # GPT-2's alphabet
        if ord(stand_in) < 256:
            return f"bytes:\\x{ord(stand_in):02x}"
        return f"bytes:\\x{[b for b in range(256) if b not in plain][ord(stand_in) - 256]:02x}"


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return Reference(model, AutoTokenizer.from_pretrained(tiny))


# --- the tests


@pytest.mark.parametrize("name", [name for name in CASES if name not in SAMPLED])
def test_every_door_says_what_transformers_says(
    doors: dict[str, Door], reference: Reference, name: str
) -> None:
    fields = CASES[name]
    want = reference.greedy(fields)
    labels = tuple(reference.label(int(token)) for token in want.tokens)
    for door, found in doors.items():
        assert len(found[name]) == fields.get("n", 1), door
        for got in found[name]:
            assert got.tokens == (labels if door in ("batch", "http") else want.tokens), door
            assert (got.text, got.finish_reason, got.stop_reason) == (
                want.text, want.finish_reason, want.stop_reason,
            ), door  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
def test_every_door_draws_the_same(doors: dict[str, Door], reference: Reference, name: str) -> None:
    """And only what transformers' filters leave."""
    fields, first = CASES[name], doors["library"][name]
    for door, found in doors.items():
        assert [got.text for got in found[name]] == [one.text for one in first], door
        for got, one in zip(found[name], first, strict=True):
            labels = tuple(reference.label(int(token)) for token in one.tokens)
            assert got.tokens == (labels if door in ("batch", "http") else one.tokens), door
            assert got.finish_reason == one.finish_reason
    filters = [
        TemperatureLogitsWarper(float(fields["temperature"])),
        *([TopKLogitsWarper(fields["top_k"])] if "top_k" in fields else []),
        *([TopPLogitsWarper(float(fields["top_p"]))] if "top_p" in fields else []),
        *([MinPLogitsWarper(float(fields["min_p"]))] if "min_p" in fields else []),
    ]
    for one in first:
        tokens = [int(token) for token in one.tokens]
        for at, logits in enumerate(reference.logits(tokens)):
            seen = torch.tensor([[*reference.prompt, *tokens[:at]]])
            scores = logits[None].clone()
            penalty = fields.get("repetition_penalty", 1)
            for token in set(seen[0].tolist()):
                value = float(scores[0, token])
                scores[0, token] = value / penalty if value > 0 else value * penalty
            for warp in filters:
                scores = warp(seen, scores)
            assert torch.isfinite(scores[0, tokens[at]]), (name, at)


def test_seeds_of_n_answers_follow_each_other(doors: dict[str, Door]) -> None:
    for found in doors.values():
        one, next_one, both = (found[n] for n in ("drawn", "drawn next seed", "drawn n"))
        assert [got.tokens for got in (*one, *next_one)] == [got.tokens for got in both]


@pytest.mark.parametrize("name", ["logprobs", "logprobs biased"])
def test_logprobs_are_those_of_the_logits(
    doors: dict[str, Door], reference: Reference, name: str
) -> None:
    for door, found in doors.items():
        (got,) = found[name]
        tokens = [int(token) for token in doors["library"][name][0].tokens]
        logits = reference.logits(tokens).double()
        for token, bias in CASES[name].get("logit_bias", {}).items():
            logits[:, int(token)] += bias
        want = torch.log_softmax(logits, -1)[range(len(tokens)), tokens]
        assert got.logprobs == pytest.approx(want.tolist(), abs=1e-4), door
