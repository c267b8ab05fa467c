"""Steps of one answer: whatever the deltas, nothing is lost, and tokens are counted as what they
are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from ds_cp.api.chat.events import CallEnd, Content, Event, Finished, Step
from ds_cp.api.chat.reader import BROKEN, AnswerReader
from ds_cp.outputs import Delta
from ds_cp.parsing.calls import Toolbox
from ds_cp.parsing.chain import Plain
from ds_cp.parsing.registry import make_parser
from tests.unit.parsing.answers import TOOLS, Read, read

CALL = '<tool_call>\n{"name": "get_time", "arguments": {"a": 1}}\n</tool_call>'
ANSWER = [
    "<think>", "\n", "Let", " me", " see", "</think>", "\n\n", "It", " is", " ", "<tool_call>",
    "\n", '{"name": "get', '_time", ', '"arguments": ', '{"a"', ": 1}", "}", "\n", "</tool_call>",
]  # fmt: skip


def reader(
    parser: Any = None, marks: Sequence[str] = (), tokens: Sequence[str] = ANSWER
) -> AnswerReader:
    made = parser or make_parser("hermes", "think", TOOLS)
    return AnswerReader(made, marks, lambda token: tokens[token])


def deltas(tokens: Sequence[str], cuts: Sequence[int], reason: str | None = "stop") -> list[Delta]:
    """The tokens as deltas that end at ``cuts``, and an end token."""
    found, start = [], 0
    for end in [*cuts, len(tokens)]:
        ids = tuple(range(start, end))
        found.append(Delta("r", ids, "".join(tokens[start:end])))
        start = end
    return [*found, Delta("r", (), "", finish_reason=reason)]


def said(steps: Sequence[Step]) -> Read:
    return read([event for step in steps for event in step.events])


@pytest.mark.parametrize("seed", range(8))
def test_any_deltas_give_the_same_answer_and_the_same_count(seed: int) -> None:
    pick = random.Random(seed)
    cuts = sorted(pick.sample(range(1, len(ANSWER)), seed * 2))
    one = reader()
    steps = [one.read(delta) for delta in deltas(ANSWER, cuts)]
    found = said(steps)
    assert (found.reasoning, found.content) == ("Let me see", "It is")
    assert found.calls == [("get_time", {"a": 1})]
    assert steps[-1].finished == Finished("tool_calls")
    assert one.reasoning_tokens == 6  # with both marks
    assert [token for step in steps for token in step.token_ids] == list(range(len(ANSWER)))


@pytest.mark.parametrize(
    ("tokens", "reason", "finish"),
    [(["hi"], "stop", "stop"), (ANSWER, "length", "length"), (ANSWER, "abort", "abort")],
)
def test_why_it_ended(tokens: list[str], reason: str, finish: str) -> None:
    one = reader(tokens=tokens)
    steps = [one.read(delta) for delta in deltas(tokens, [], reason)]
    assert steps[-1].finished == Finished(finish)  # type: ignore[arg-type]


def test_the_stop_reason_and_the_tokens_pass() -> None:
    one = AnswerReader(Plain(), (), lambda token: "x", 3)
    step = one.read(Delta("r", (4, 5), "xx", (), "stop", "END"))
    assert step == Step(3, [Content("xx")], (4, 5), (), Finished("stop", "END"))
    assert one.reasoning_tokens == 0


def test_a_call_that_is_cut_ends() -> None:
    one = reader()
    steps = [one.read(delta) for delta in deltas(ANSWER[:16], [], "length")]
    found = said(steps)
    assert found.names == ["get_time"] and found.problems[0]
    assert steps[-1].finished == Finished("length")


@pytest.mark.parametrize(
    ("tokens", "finish"), [(16, "stop"), (len(ANSWER), "tool_calls"), (9, "stop")]
)
def test_a_call_that_the_clients_stop_cuts_is_not_to_be_run(tokens: int, finish: Any) -> None:
    """It is not a reason to run a tool, but one that is complete before the stop is."""
    one = reader()
    one.read(Delta("r", tuple(range(tokens)), "".join(ANSWER[:tokens])))
    step = one.read(Delta("r", (), "", finish_reason="stop", stop_reason=": 1}"))
    assert step.finished == Finished(finish, ": 1}")


def test_special_tokens_that_the_parser_leaves_are_no_text() -> None:
    marks = ["<tool_call>", "</tool_call>", "</think>"]
    tokens = ["a", "</tool_call>", " b", "</think>", "c ", "<tool_call>", "no call"]
    one = reader(marks=marks, tokens=tokens)
    found = said([one.read(delta) for delta in deltas(tokens, [1, 2, 3, 4, 5, 6])])
    assert found.content == "a bc no call" and not found.names


class Failing:
    """Fails at a text; until then a call is open and a text is held."""

    def __init__(self, inner: Any, at: str) -> None:
        self.inner, self.at = inner, at

    def feed(self, text: str) -> list[Event]:
        if self.at in text:
            raise ZeroDivisionError
        return list(self.inner.feed(text))

    def finish(self) -> list[Event]:
        if self.at == "finish":
            raise ZeroDivisionError
        return list(self.inner.finish())


@pytest.mark.parametrize("at", ["BAD", "finish"])
def test_a_parser_that_fails_loses_no_text(at: str, caplog: pytest.LogCaptureFixture) -> None:
    tokens = ["It is ", "<tool_", "call>\n", '{"na', "BAD", " and", " more"]
    cuts = list(range(1, len(tokens)))
    one = reader(Failing(make_parser("hermes", None, TOOLS), at), tokens=tokens)
    steps = [one.read(delta) for delta in deltas(tokens, cuts)]
    assert said(steps).content.replace(" ", "") == "".join(tokens).replace(" ", "")
    assert steps[-1].finished == Finished("stop") and BROKEN in caplog.text


def test_a_call_in_which_the_parser_fails_is_ended() -> None:
    tokens = ["<tool_call>", '{"name": "get_time", "arguments": ', '{"a": ', "BAD", "x"]
    one = reader(Failing(make_parser("hermes", None, TOOLS), "BAD"), tokens=tokens)
    steps = [one.read(delta) for delta in deltas(tokens, [1, 2, 3, 4])]
    events = [event for step in steps for event in step.events]
    assert CallEnd(0, False, BROKEN) in events
    assert said(steps).content == "BADx" and steps[-1].finished == Finished("tool_calls")


def test_reasoning_that_comes_again_is_counted() -> None:
    tokens = ["[THINK]", "a", "b", "[/THINK]", "c", "[THINK]", "d", "[/THINK]", "e"]
    parser = make_parser(None, "magistral", Toolbox())
    one = reader(parser, tokens=tokens)
    found = said([one.read(delta) for delta in deltas(tokens, [4])])
    assert found.reasoning.replace("\n", "") == "abd" and found.content == "ce"
    assert one.reasoning_tokens == 4 + 3


def test_what_is_held_is_charged_until_it_comes() -> None:
    tokens = ['{"name": "get_time", "arguments": "', *["abcd"] * 500, '"}', " and more"]
    one = reader(make_parser("json", None, TOOLS), tokens=tokens)
    sizes = []
    for delta in deltas(tokens, range(1, len(tokens))):
        one.read(delta)
        sizes.append(one.held_bytes)
    growing = sizes[: len(tokens) - 2]
    assert growing == sorted(growing) and growing[-1] == 8 * sum(map(len, tokens[:-2]))
    assert set(sizes[len(tokens) - 2 :]) == {0}
