"""Calls of a conversation: how many are forced, and the results of earlier ones."""

from __future__ import annotations

from ds_cp.api.chat.request import Turn, first_unasked
from ds_cp.api.chat.start import plan_answer
from ds_cp.grammar.matcher import Compiler
from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.parsing.calls import MAX_CALLS
from ds_cp.parsing.history import EarlierCall
from ds_cp.parsing.registry import TOOL_FAMILIES
from tests.unit.api.chat import test_plan as plans


def test_no_more_calls_are_forced_than_a_client_can_send_back() -> None:
    names = [b"<eos>", *(name.encode() for name in plans.SPECIAL)]
    texts = [*names, *(bytes([byte]) for byte in range(256))]
    compiler = Compiler(Vocabulary.of(texts, range(len(names))))
    style = plans.style("hermes")
    plan = plan_answer(plans.chat("required"), style, plans.KNOWS, "<|im_start|>assistant\n")
    call = TOOL_FAMILIES["hermes"].format.render([("get_time", {})])
    assert plans.fine(compiler, plan, call * MAX_CALLS)
    assert not plans.fine(compiler, plan, call * (MAX_CALLS + 1))


def test_a_result_needs_its_call() -> None:
    asks = Turn(role="assistant", calls=[EarlierCall("c1", "f", "{}"), EarlierCall("c2", "f", "")])
    first, second = (Turn(role="tool", answers=id_) for id_ in ("c1", "c2"))
    hi = Turn(role="user", content="hi")
    assert first_unasked([hi, asks, second, hi, first, first]) is None
    assert first_unasked([hi, asks, hi]) is None  # a client may have cut the results
    assert first_unasked([hi, first, asks]) == 1
    assert first_unasked([asks, second, Turn(role="tool", answers="c3")]) == 2
