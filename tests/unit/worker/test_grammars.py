"""States of grammars on one rank follow the tokens, however these become known there."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from ds_cp.grammar.constraint import StructuredOutputsParams
from ds_cp.grammar.matcher import Compiler
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.kv.table import SequenceTable
from ds_cp.plan import Sampling
from ds_cp.worker.grammars import Grammars
from ds_cp.worker.state import Draw, RunningSequence

END = 0
VOCABULARY = Vocabulary.of([b"<end>", *(bytes([n]) for n in range(32, 127))], [END])
SOURCE = StructuredOutputsParams(regex=r"(ab|cd{2,9}e)+\.").source


def sequence(number: int, outputs: list[int], last: int = -1) -> RunningSequence:
    how = Sampling(grammar=SOURCE, ends=(END,))
    drawn = len(outputs) + (last >= 0)
    table = SequenceTable(4, (), 0)
    return RunningSequence(number, (1,), 1, table, how, drawn, last=last, outputs=outputs)


def draw(one: RunningSequence) -> Draw:
    return Draw(one, 0, one.drawn)


def wanted(tokens: list[int]) -> bytes:
    matcher = Compiler(VOCABULARY).compile(SOURCE)
    matcher.advance(tokens, {END})
    return matcher.allowed({END})


def ids_in(mask: bytes) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


@pytest.fixture
def grammars() -> Grammars:
    grammars = Grammars()
    grammars.learn(VOCABULARY)
    return grammars


def masks(grammars: Grammars, *draws: Draw) -> dict[int, bytes]:
    grammars.start(draws)
    return grammars.masks()


def test_masks_follow_the_tokens_of_a_pipelined_loop(grammars: Grammars) -> None:
    """The last token is known by its draw alone; rank 0 announces it one or more steps later, or
    several at once."""
    rng = random.Random(0)
    one, told, true = sequence(7, []), 0, []
    for _ in range(60):
        mask = masks(grammars, draw(one))[7]
        assert mask == wanted(true)
        token = rng.choice(ids_in(mask))
        if token == END:
            break
        true.append(token)
        one.last = token
        one.drawn += 1
        # What came before the last one is announced by now, and sometimes the last one too.
        told = len(true) - rng.randrange(2)
        one.outputs[:] = true[:told]
    assert len(true) > 5


def test_a_request_that_was_elsewhere_or_begins_again_has_its_state_made_again(
    grammars: Grammars,
) -> None:
    tokens = [VOCABULARY.tokens().index(bytes([c])) for c in b"abcddeab"]
    here = sequence(1, tokens[:3])
    assert masks(grammars, draw(here))[1] == wanted(tokens[:3])
    # steps on another rank; the last token came with a handoff
    here.outputs, here.last, here.drawn = tokens[:6], tokens[6], 7
    assert masks(grammars, draw(here))[1] == wanted(tokens[:7])
    grammars.forget([1, 99])
    again = sequence(1, tokens[:5])
    assert masks(grammars, draw(again))[1] == wanted(tokens[:5])
    grammars.clear()
    assert masks(grammars, draw(sequence(1, [])))[1] == wanted([])


def test_only_requests_with_a_grammar_have_masks(grammars: Grammars) -> None:
    free = sequence(2, [])
    free.sampling = Sampling()
    assert masks(grammars, draw(free)) == {} == masks(grammars)
    assert set(masks(grammars, draw(free), draw(sequence(3, [])))) == {3}


def test_a_failure_is_its_requests_alone_and_stays(grammars: Grammars, capfd: Any) -> None:
    wrong = sequence(4, [1])  # "!", which the grammar does not allow
    unknown = sequence(5, [], last=-1)
    unknown.drawn = 1  # its first token could not be drawn
    broken = sequence(6, [])
    broken.sampling = Sampling(grammar="start: (", ends=(END,))
    fine = sequence(7, [])
    for _ in range(2):
        found = masks(grammars, *map(draw, (wrong, unknown, broken, fine)))
        assert found == {7: wanted([])}
    said = capfd.readouterr().err
    assert [said.count(f"request {n}: its grammar failed") for n in (4, 5, 6, 7)] == [1, 1, 1, 0]


def test_masks_that_do_not_come_in_time_fail_their_requests_and_no_later_ones(
    grammars: Grammars, capfd: Any
) -> None:
    masks(grammars, draw(sequence(1, [])))
    gate = threading.Event()
    assert grammars._thread is not None
    grammars._thread.submit(gate.wait, 60)
    grammars._wait_s = 0.05
    assert masks(grammars, draw(sequence(1, []))) == {}
    grammars._wait_s = 60.0
    assert masks(grammars, draw(sequence(2, []))) == {}  # waits no more
    assert capfd.readouterr().err.count("no masks of grammars within 0.05 s") == 1
    gate.set()
    assert grammars._late is not None
    grammars._late.result(60)
    grammars.forget([1, 2])  # rank 0 has ended them
    assert masks(grammars, draw(sequence(3, []))) == {3: wanted([])}
