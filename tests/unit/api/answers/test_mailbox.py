"""Deltas that wait for a slow client: none is lost, and they hold little."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from dataclasses import replace

import pytest

from ds_cp.api.answers.budget import DELTA_BYTES, MIB, PACKED_BYTES, Budget, Held
from ds_cp.api.answers.mailbox import APART, JOINED_ENTRIES, JOINED_TOKENS, Mailbox
from ds_cp.errors import EngineDeadError
from ds_cp.outputs import Delta, TokenLogprob


def a_delta(index: int, number: int, top: int | None, last: bool = False) -> Delta:
    logprobs = None
    if top is not None:
        others = tuple((number + i, -1.0 - i - number / 7) for i in range(top))
        logprobs = (TokenLogprob(number, -0.5, others, number),)
    return Delta(
        "r", (number,), f"<{number}>", logprobs, "stop" if last else None, 7 if last else None,
        index, 3 if number == 0 and index == 0 else None,
    )  # fmt: skip


def joined(deltas: list[Delta], index: int) -> Delta:
    """All deltas of an answer as one."""
    own = [delta for delta in deltas if delta.index == index]
    scored = own[0].logprobs is not None
    return replace(
        own[-1],
        token_ids=tuple(i for delta in own for i in delta.token_ids),
        text="".join(delta.text for delta in own),
        logprobs=tuple(e for delta in own for e in delta.logprobs or ()) if scored else None,
        cached_tokens=own[0].cached_tokens,
    )


@pytest.mark.parametrize("top", [None, 0, 20])
@pytest.mark.parametrize("reads", [0.0, 0.3, 1.0])
def test_nothing_is_lost_whatever_the_reader_does(top: int | None, reads: float) -> None:
    """The writer goes on whether or not the reader does."""
    dice = random.Random(reads)
    answers, tokens = 3, 400
    sent = [
        a_delta(index, number, top, last=number == tokens - 1)
        for number in range(tokens)
        for index in dice.sample(range(answers), answers)
    ]

    async def main() -> list[Delta]:
        box, got = Mailbox(Held(Budget(MIB))), []
        for number, delta in enumerate(sent):
            box.put(0, delta)
            if number < 200 or dice.random() < reads:
                got.append((await box.get())[1])
        while sum(delta.finish_reason is not None for delta in got) < answers:
            got.append((await asyncio.wait_for(box.get(), 5))[1])
        return got

    got = asyncio.run(main())
    for index in range(answers):
        assert joined(got, index) == joined(sent, index)
    assert max(len(delta.token_ids) for delta in got) <= JOINED_TOKENS
    if top is not None:
        assert max(len(d.logprobs or ()) * (top + 1) for d in got) < JOINED_ENTRIES + top + 1
    if reads == 1.0:
        assert got == sent  # who keeps up gets every delta as it came
    elif top != 20:
        assert len(got) < len(sent) / 2


def test_waiting_tokens_hold_little() -> None:
    """What the HTTP application counts for a token of a stream, without log-probabilities."""

    async def main() -> float:
        box = Mailbox(Held(Budget(MIB)))
        for number in range(APART):
            box.put(0, a_delta(0, number, None))
        tracemalloc.start()
        for number in range(20_000):
            box.put(0, Delta("r", (number + 1000,), "abcd"))
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size / 20_000

    assert asyncio.run(main()) < DELTA_BYTES * 1.1


def test_an_error_comes_after_what_was_said_before_it() -> None:
    async def main() -> None:
        box = Mailbox(Held(Budget(MIB)))
        sent = [a_delta(0, number, None) for number in range(2 * APART)]
        for delta in sent:
            box.put(0, delta)
        box.put(0, Delta("r", finish_reason="error"))
        box.put(0, EngineDeadError("over"))
        got: list[Delta] = []
        with pytest.raises(EngineDeadError):
            while True:
                got.append((await box.get())[1])
        assert got[-1] == Delta("r", finish_reason="error")
        assert joined(got[:-1], 0) == joined(sent, 0)

    asyncio.run(main())


def test_a_reader_that_waits_is_woken() -> None:
    async def main() -> None:
        box = Mailbox(Held(Budget(MIB)))
        reading = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        assert not reading.done()
        box.put(0, a_delta(0, 5, None))
        assert await asyncio.wait_for(reading, 60) == (0, a_delta(0, 5, None))

    asyncio.run(main())


def test_what_waits_is_charged_and_never_refused() -> None:
    """Beyond what was reserved, and beyond the whole budget; it keeps new requests out."""

    async def main() -> None:
        budget = Budget(MIB)
        held = Held(budget)
        held.reserve(100_000)
        box = Mailbox(held)
        sent = [a_delta(0, number, 20) for number in range(4000)]
        for delta in sent:
            box.put(0, delta)
        assert budget.used > (4000 - APART) * 21 * PACKED_BYTES > budget.limit
        assert not Held(budget).has_room(1)
        got = []
        while sum(len(delta.token_ids) for delta in got) < 4000:
            got.append((await box.get())[1])
        assert joined(got, 0) == joined(sent, 0)
        assert held.spent == 0 and budget.used == 100_000

    asyncio.run(main())


def test_jobs_are_not_mixed() -> None:
    async def main() -> None:
        box = Mailbox(Held(Budget(MIB)))
        for number in range(200):
            for job in range(2):
                box.put(job, a_delta(0, 1000 * job + number + 1, None))
        seen: dict[int, list[int]] = {0: [], 1: []}
        while len(seen[0]) + len(seen[1]) < 400:
            job, delta = await box.get()
            seen[job] += delta.token_ids
        assert seen == {job: [*range(1000 * job + 1, 1000 * job + 201)] for job in range(2)}

    asyncio.run(main())
