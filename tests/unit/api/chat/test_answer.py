"""What reading an answer takes of its request's memory, and what it adds to the counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from ds_cp.api.answer_metrics import AnswerMetrics
from ds_cp.api.answers.budget import Budget, Held
from ds_cp.api.chat.answer import ChatAnswer
from ds_cp.api.chat.events import Step
from ds_cp.api.chat.reader import AnswerReader
from ds_cp.grammar.constraint import FIELD
from ds_cp.outputs import Delta
from ds_cp.parsing.registry import make_parser
from ds_cp.sampling_params import SamplingParams
from tests.unit.parsing.answers import TOOLS

HELD = '{"name": "get_time", "arguments": "'
ANSWERS = 3


class Silent(ChatAnswer):
    """Nothing is sent of it."""

    def events_of(self, step: Step) -> Iterable[Any]:
        return step.events

    def whole(self) -> Iterator[bytes]:
        return iter(())

    def opening(self) -> Iterable[Any]:
        return ()

    def closing(self) -> Iterable[Any]:
        return ()


def answer(held: Held, parser: Any = None) -> tuple[Silent, CollectorRegistry]:
    registry = CollectorRegistry()
    context: Any = SimpleNamespace(
        metrics=SimpleNamespace(answers=AnswerMetrics(registry, lambda: "m"))
    )
    readers = [
        AnswerReader(parser or make_parser("json", "think", TOOLS), (), lambda _: "", index)
        for index in range(ANSWERS)
    ]
    conversation: Any = SimpleNamespace(
        prompt_ids=[1, 2], params=SamplingParams(n=ANSWERS), readers=readers, held=held
    )
    return Silent(context, conversation), registry


def delta(text: str, index: int, reason: str | None = None) -> Delta:
    return Delta("r", (5,), text, finish_reason=reason, index=index)


def test_what_the_parsers_of_all_answers_hold_is_charged() -> None:
    """Beyond what was reserved too, so that other requests wait, and until the text comes."""
    budget = Budget(1 << 30)
    held = Held(budget)
    held.reserve(1000)
    one, _ = answer(held)
    pieces = [HELD, *["abcd" * 8] * 400]
    for piece in pieces:
        for index in range(ANSWERS):
            list(one.chunks_of(0, delta(piece, index)))
    chars = sum(map(len, pieces))
    assert budget.used == held.spent == 8 * ANSWERS * chars
    list(one.chunks_of(0, delta('"}', 0)))  # the call is whole
    assert held.spent == 8 * 2 * chars
    list(one.chunks_of(0, delta("", 1, "length")))  # the text is content
    assert held.spent == 8 * chars
    one.record(0, delta("x" * (1 << 19), 2))  # more than is ever held
    assert held.spent == 0 and budget.used == 1000


def test_calls_reasoning_and_grammars_are_counted() -> None:
    one, registry = answer(Held(Budget(1 << 30)))

    def count(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"ds_cp:{name}_total", {"model_name": "m"} | labels)

    assert count("reasoning_tokens") is None  # nothing has a name before the engine has
    call = '{"name": "get_time", "arguments": '
    for index, (texts, reason) in enumerate((
        (("<think>", "hm", "</think>", call, '{"a": 1}}', f"; {call}{{}}}}"), "stop"),
        ((call, '{"a" 1}}'), "stop"),
        ((call, '{"a": '), "length"),
    )):  # fmt: skip
        for text in texts:
            list(one.chunks_of(0, delta(text, index)))
        list(one.chunks_of(0, delta("", index, reason)))
    assert [count("tool_calls", outcome=o) for o in ("complete", "not_json", "unfinished")] == [
        2, 1, 1,
    ]  # fmt: skip
    assert count("reasoning_tokens") == one.usage.reasoning == 3
    assert count("parser_failures") == count("grammar_answers", outcome="stop") == 0
    counted = AnswerMetrics(registry := CollectorRegistry(), lambda: "m")
    for reason, field in (("stop", None), ("length", None), ("error", FIELD), ("error", None)):
        counted.ended(Delta("r", finish_reason=reason, stop_reason=field), constrained=True)
        counted.ended(Delta("r", finish_reason=reason), constrained=False)
    for outcome in ("stop", "length", "error", "grammar"):
        assert count("grammar_answers", outcome=outcome) == 1, outcome


def test_a_parser_that_fails_is_counted_once_an_answer() -> None:
    class Failing:
        def feed(self, text: str) -> list[Any]:
            raise ZeroDivisionError

        finish = feed

    one, registry = answer(Held(Budget(1 << 30)), Failing())
    for index in (0, 0, 1):
        list(one.chunks_of(0, delta("a", index)))
    assert registry.get_sample_value("ds_cp:parser_failures_total", {"model_name": "m"}) == 2
