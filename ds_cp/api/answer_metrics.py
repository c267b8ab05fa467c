"""Counters of what answers hold: tool calls, reasoning, and what became of grammars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter

from ds_cp.api.chat.reader import BROKEN
from ds_cp.grammar.constraint import FIELD
from ds_cp.outputs import Delta
from ds_cp.parsing.calls import UNFINISHED
from ds_cp.parsing.events import CallEnd, Event

CALL_OUTCOMES = ("complete", "not_json", "unfinished")
GRAMMAR_OUTCOMES = ("stop", "length", "abort", "error", "grammar")


class AnswerMetrics:
    """Counted as answers are read, whatever their protocol. Every label is there from the first
    answer on, so that a rate has its first step. ``model_name``: called at each count."""

    def __init__(self, registry: CollectorRegistry, model_name: Callable[[], str]) -> None:
        self._name = model_name
        self._begun = False
        self._calls = Counter(
            "ds_cp:tool_calls",
            "Tool calls that answers made: complete; of arguments that are no JSON object; cut by "
            "the end of the answer.",
            labelnames=("model_name", "outcome"),
            registry=registry,
        )
        self._failures = Counter(
            "ds_cp:parser_failures",
            "Answers at which the parser of calls and reasoning failed: a fault of the server.",
            labelnames=("model_name",),
            registry=registry,
        )
        self._reasoning = Counter(
            "ds_cp:reasoning_tokens",
            "Tokens of answers that are reasoning.",
            labelnames=("model_name",),
            registry=registry,
        )
        self._grammars = Counter(
            "ds_cp:grammar_answers",
            "Answers under a grammar that ended, by why: the reasons of request_success, and "
            "grammar where it allowed no token or passed its bounds.",
            labelnames=("model_name", "outcome"),
            registry=registry,
        )

    def read(self, events: Sequence[Event], reasoning_tokens: int) -> None:
        """A step of an answer was read; ``reasoning_tokens``: of its tokens."""
        name = self._name()
        for event in events:
            if isinstance(event, CallEnd):
                self._calls.labels(name, _outcome(event)).inc()
        if reasoning_tokens:
            self._reasoning.labels(name).inc(reasoning_tokens)

    def parser_failed(self) -> None:
        """The parser of an answer failed."""
        self._failures.labels(self._name()).inc()

    def ended(self, last: Delta, constrained: bool) -> None:
        """An answer has its last delta. ``constrained``: by a grammar."""
        name = self._name()
        if not self._begun:
            self._begun = True
            self._failures.labels(name)
            self._reasoning.labels(name)
            for outcome in CALL_OUTCOMES:
                self._calls.labels(name, outcome)
            for outcome in GRAMMAR_OUTCOMES:
                self._grammars.labels(name, outcome)
        if constrained:
            at_fault = last.finish_reason == "error" and last.stop_reason == FIELD
            outcome = "grammar" if at_fault else str(last.finish_reason)
            self._grammars.labels(name, outcome).inc()


def _outcome(call: CallEnd) -> str:
    if call.complete:
        return "complete"
    return "unfinished" if call.problem in (UNFINISHED, BROKEN) else "not_json"
