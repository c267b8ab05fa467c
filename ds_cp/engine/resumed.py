"""Requests that go on after a restart: their answers begin with what is known of them."""

from __future__ import annotations

from collections.abc import Sequence

from ds_cp.engine.calls import Answer, Call
from ds_cp.engine.detokenize import IncrementalDetokenizer
from ds_cp.errors import RequestError
from ds_cp.sampling_params import KnownAnswer, SamplingParams
from ds_cp.scheduler.scheduler import Scheduler


def read_again(
    texts: Sequence[IncrementalDetokenizer | None],
    params: SamplingParams,
    known: Sequence[KnownAnswer],
) -> None:
    """Bring the texts of answers to where they were; nobody gets them again. Raises
    ``RequestError`` for tokens that the tokenizer cannot decode."""
    try:
        for text, one in zip(texts, known, strict=bool(known)):
            for count, token in enumerate(one.token_ids, 1):
                if text is not None:
                    text.push(token, count > params.min_tokens)
    except Exception as err:  # whatever a tokenizer raises concerns this request alone
        raise RequestError(
            f"the tokenizer cannot decode what the answer has ({type(err).__name__}: {err})"
        ) from err


def resume(scheduler: Scheduler, call: Call, known: Sequence[KnownAnswer]) -> list[Answer]:
    """Give the answers of a call that was just added the tokens that they have: each is a prompt
    with them, as after a preemption, and on its own, as their ends differ. Returns those that had
    ended, which the scheduler has no more."""
    if not known:
        return []
    first = call.answers[0].request
    siblings, first.siblings = first.siblings, []
    for sibling in siblings:
        scheduler.waiting.push(sibling)
    ended = []
    for answer, one in zip(call.answers, known, strict=True):
        answer.request.output.extend(one.token_ids)
        if one.finish_reason is not None:
            scheduler.finish(answer.request, one.finish_reason, one.stop_reason)
            ended.append(answer)
    call.sent_prompt = bool(known[0].token_ids)
    return ended
