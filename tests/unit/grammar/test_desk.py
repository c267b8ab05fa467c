"""Grammars checked in a process beside: kept ones, refused ones, and those that would not end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ds_cp.errors import GrammarBusyError, RequestError
from ds_cp.grammar import desk as desk_module
from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.desk import GrammarDesk
from ds_cp.grammar.matcher import Compiler
from tests.helpers.fake_engine import make_tokenizer

# Rules of rules: the library walks them by recursion, until the stack ends its process.
CHAIN = "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(2900)) + '\na2900: "x"'


def regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def desk(tokenizer: Any) -> Iterator[GrammarDesk]:
    desk = GrammarDesk(tokenizer)
    yield desk
    desk.close()


def test_what_is_accepted_compiles_on_a_rank(desk: GrammarDesk) -> None:
    for wish in (
        {"json": {"type": "object"}},
        {"regex": "a+"},
        {"choice": ["a", "b"]},
        {"grammar": 'root ::= "a" [0-9]+'},
        {"grammar": 'start: "a" /[0-9]+/'},
        {"json_object": True},
    ):
        source = desk.check(StructuredOutputsParams(**wish))  # type: ignore[arg-type]
        Compiler(desk.vocabulary).compile(source)


def test_a_refusal_names_the_field_and_the_reason_and_is_remembered(desk: GrammarDesk) -> None:
    wish = StructuredOutputsParams(json={"not": {}}, asked_as="response_format")
    assert desk.recall(wish) is None
    for ask in (desk.check, desk.check, desk.recall):
        with pytest.raises(
            RequestError, match=r'^response_format: .*Unimplemented keys: \["not"\]'
        ):
            ask(wish)
    assert desk.recall(regex("remembered")) is None
    desk.check(regex("remembered"))
    pid = desk.pid
    assert desk.recall(regex("remembered")) == regex("remembered").source and desk.pid == pid


def test_a_grammar_that_ends_its_process_is_refused_and_others_go_on(desk: GrammarDesk) -> None:
    desk.check(regex("before"))
    pid = desk.pid
    with pytest.raises(RequestError, match="does not compile within 2 s of computing and 512 MiB"):
        desk.check(StructuredOutputsParams(grammar=CHAIN))
    desk.check(regex("after"))
    assert desk.pid == pid


def test_time_and_memory_are_bounded_by_the_kernel(tokenizer: Any) -> None:
    many = {"enum": [f"value {n}" for n in range(5000)]}
    for limits in ({"cpu_s": 0.001}, {"memory_bytes": 1 << 12}):
        small = GrammarDesk(tokenizer, **limits)  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(RequestError, match="does not compile within"):
            small.check(StructuredOutputsParams(json=many))
        assert time.monotonic() - began < desk_module.WALL_S
        small.close()


def test_its_process_is_started_again(desk: GrammarDesk) -> None:
    desk.check(regex("one"))
    pid = desk.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            desk.check(regex(f"again {time.monotonic_ns()}"))
            break
        except RequestError:  # it had not ended yet
            time.sleep(0.01)
    assert desk.pid not in (pid, None)


def test_many_threads_ask_at_once(desk: GrammarDesk) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = [f"thread {n % 20}" for n in range(60)]
        found = list(threads.map(lambda text: desk.check(regex(text)), texts))
    assert found == [regex(text).source for text in texts]


def test_waiting_for_others_ends_in_time(desk: GrammarDesk) -> None:
    for _ in range(desk_module.AT_ONCE):
        desk._slots.acquire()
    try:
        with pytest.raises(GrammarBusyError, match="2 at a time"):
            desk.check(regex("waits"), timeout_s=0.05)
    finally:
        for _ in range(desk_module.AT_ONCE):
            desk._slots.release()
    assert desk.check(regex("waits"))


@pytest.mark.parametrize("tokenizer", [None, object()])
def test_without_a_fast_tokenizer_it_is_not_available(tokenizer: object) -> None:
    with pytest.raises(RequestError, match="not available: it needs a fast tokenizer"):
        GrammarDesk(tokenizer).check(regex("a"))


def test_closed_it_starts_no_process(tokenizer: Any) -> None:
    closed = GrammarDesk(tokenizer)
    closed.check(regex("a"))
    pid = closed.pid
    closed.close()
    closed.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid or 0, 0)
    with pytest.raises(RequestError, match="not available"):
        closed.check(regex("b"))
