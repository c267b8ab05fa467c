"""Grammars checked in a process beside: kept ones, refused ones, and those that would not end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from ds_cp import sandbox
from ds_cp.errors import GrammarBusyError, RequestError
from ds_cp.grammar import checker as module
from ds_cp.grammar.checker import GrammarChecker
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.matcher import Compiler
from ds_cp.grammar.messages import Unable
from tests.helpers.fake_engine import make_tokenizer

# Rules of rules: the library walks them by recursion, until the stack ends its process.
CHAIN = "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(2900)) + '\na2900: "x"'


def regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def checker(tokenizer: Any) -> Iterator[GrammarChecker]:
    checker = GrammarChecker(tokenizer)
    yield checker
    checker.close()


def test_what_is_accepted_compiles_on_a_rank(checker: GrammarChecker) -> None:
    for wish in (
        {"json": {"type": "object"}},
        {"regex": "a+"},
        {"choice": ["a", "b"]},
        {"grammar": 'root ::= "a" [0-9]+'},
        {"grammar": 'start: "a" /[0-9]+/'},
        {"json_object": True},
    ):
        source = checker.check(StructuredOutputsParams(**wish))  # type: ignore[arg-type]
        Compiler(checker.vocabulary).compile(source)


def test_a_refusal_names_the_field_and_the_reason_and_is_remembered(
    checker: GrammarChecker,
) -> None:
    wish = StructuredOutputsParams(json={"not": {}}, asked_as="response_format")
    assert checker.recall(wish) is None
    for ask in (checker.check, checker.check, checker.recall):
        with pytest.raises(
            RequestError, match=r'^response_format: .*Unimplemented keys: \["not"\]'
        ):
            ask(wish)
    assert checker.recall(regex("remembered")) is None
    checker.check(regex("remembered"))
    pid = checker.pid
    assert checker.recall(regex("remembered")) == regex("remembered").source and checker.pid == pid


def test_a_grammar_that_ends_its_process_is_refused_and_others_go_on(
    checker: GrammarChecker,
) -> None:
    checker.check(regex("before"))
    pid = checker.pid
    with pytest.raises(RequestError, match="does not compile within 2 s of computing and 512 MiB"):
        checker.check(StructuredOutputsParams(grammar=CHAIN))
    checker.check(regex("after"))
    assert checker.pid == pid


def test_a_grammar_that_grows_when_it_is_converted_is_bounded(checker: GrammarChecker) -> None:
    """GBNF's ``.`` becomes ``/./``; what travels in plans is the converted text."""
    dots = StructuredOutputsParams(grammar="root ::= " + "." * 70_000)
    with pytest.raises(RequestError, match=r"it has 280\d+ bytes once converted; at most 262144"):
        checker.check(dots, timeout_s=120)


def test_time_and_memory_are_bounded_by_the_kernel(tokenizer: Any) -> None:
    many = {"enum": [f"value {n}" for n in range(5000)]}
    for limits in ({"cpu_s": 0.001}, {"memory_bytes": 1 << 12}):
        small = GrammarChecker(tokenizer, **limits)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="does not compile within"):
            small.check(StructuredOutputsParams(json=many), timeout_s=120)
        small.close()


def test_its_process_is_started_again(checker: GrammarChecker) -> None:
    checker.check(regex("one"))
    pid = checker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            checker.check(regex(f"again {time.monotonic_ns()}"))
            break
        except RequestError:  # it had not ended yet
            time.sleep(0.01)
    assert checker.pid not in (pid, None)


def test_many_threads_ask_at_once(checker: GrammarChecker) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = [f"thread {n % 20}" for n in range(60)]
        found = list(threads.map(lambda text: checker.check(regex(text)), texts))
    assert found == [regex(text).source for text in texts]


def test_waiting_for_others_ends_in_time(checker: GrammarChecker) -> None:
    for _ in range(module.AT_ONCE):
        checker._slots.acquire()
    try:
        with pytest.raises(GrammarBusyError, match=r"^structured_outputs: .* 2 at a time"):
            checker.check(regex("waits"), timeout_s=0.05)
        with pytest.raises(GrammarBusyError, match="^guided_regex: "):
            checker.check(replace(regex("waits"), asked_as="guided_regex"), timeout_s=0.05)
    finally:
        for _ in range(module.AT_ONCE):
            checker._slots.release()
    assert checker.check(regex("waits"))


def test_what_is_remembered_is_bounded_in_bytes(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_CHECK_BYTES", 20_000)
    wishes = [regex(f"{n}" + 4000 * "x") for n in range(6)]
    for wish in wishes:
        checker.check(wish)
    kept = [checker.recall(wish) is not None for wish in wishes]
    assert kept == [False, False, True, True, True, True]
    assert checker.recall(wishes[-1]) is wishes[-1].source  # one copy
    assert checker._known_bytes == sum(module._size(*each) for each in checker._known.items())


def test_a_compilation_that_cannot_be_tried_is_not_remembered(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer, reason in ((Unable("no more processes"), "no more"), (None, "has ended")):
        with monkeypatch.context() as patched:
            patched.setattr(checker, "_ask", lambda _, answer=answer: answer)
            patched.setattr(checker, "_lives", lambda: False)
            with pytest.raises(RequestError, match=f"not available: .*{reason}"):
                checker.check(regex("tried later"))
    assert checker.check(regex("tried later"))


def test_closing_ends_a_start_that_takes_long(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_START", "import time; time.sleep(600)")
    slow = GrammarChecker(tokenizer)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(slow.check, regex("a"))
        while slow.pid is None:
            time.sleep(0.005)
        slow.close()  # START_S later otherwise
        with pytest.raises(RequestError, match="not available"):
            asked.result(module.START_S / 2)


@pytest.mark.parametrize("tokenizer", [None, object()])
def test_without_a_fast_tokenizer_it_is_not_available(tokenizer: object) -> None:
    with pytest.raises(RequestError, match="not available: it needs a fast tokenizer"):
        GrammarChecker(tokenizer).check(regex("a"))
    asked = replace(regex("a"), asked_as="response_format")
    with pytest.raises(RequestError, match="^response_format is not available") as caught:
        GrammarChecker(tokenizer).check(asked)
    assert caught.value.param == "response_format"


def test_closed_it_starts_no_process(tokenizer: Any) -> None:
    closed = GrammarChecker(tokenizer)
    closed.check(regex("a"))
    pid = closed.pid
    closed.close()
    closed.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid or 0, 0)
    with pytest.raises(RequestError, match="not available"):
        closed.check(regex("b"))
