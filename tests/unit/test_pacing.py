"""The chunk pacer on step times from a known machine: so many seconds quiet, so many per token."""

from __future__ import annotations

import random
import statistics

import pytest

from ds_cp.engine.pacing import (
    FIRST_ALONE,
    FIRST_CHUNK,
    GROWTH,
    LEAST_CHUNK,
    MARGIN,
    SHORTER,
    STEP_S,
    ChunkPacer,
)


def run(pacer: ChunkPacer, quiet: float, each: float, steps: int, jitter: float = 0.0) -> list[int]:
    """Steps with and without a chunk in turn; the chunks."""
    rng, chunks = random.Random(2), []
    for _ in range(steps):
        noise = 1 + rng.uniform(-jitter, jitter)
        pacer.note(quiet * noise, 8, 0)
        chunks.append(pacer.chunk(8))
        pacer.note((quiet + each * chunks[-1]) * noise, 8, chunks[-1])
    return chunks


@pytest.mark.parametrize("slowdown", [1.2, 2.0, 5.0])
@pytest.mark.parametrize(("quiet", "each"), [(0.02, 0.0005), (0.5, 0.001), (0.002, 0.00001)])
def test_a_step_with_a_chunk_takes_at_most_so_many_times_a_quiet_one(
    slowdown: float, quiet: float, each: float
) -> None:
    chunks = run(ChunkPacer(slowdown), quiet, each, 60)
    assert chunks[0] == FIRST_CHUNK
    settled = chunks[30:]
    for chunk in settled:
        assert quiet + each * chunk <= slowdown * quiet or chunk == LEAST_CHUNK
    # and the allowance is used: all of the margin, as far as whole tokens and the floor allow
    allowed = MARGIN * (slowdown - 1) * quiet / each
    full = sorted(settled)[len(settled) // SHORTER + 1 :]  # the others are half, to learn from
    assert min(full) >= max(LEAST_CHUNK, 0.9 * allowed - 1)
    assert min(settled) >= max(LEAST_CHUNK, 0.45 * allowed - 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_when_no_quiet_step_comes_between_and_tokens_grow_dearer(
    seed: int,
) -> None:
    """A long prompt beside the same four streams: every step has a chunk, and a token costs more
    the deeper it is. What a token costs must not be taken for the cost of a step."""
    pacer, rng = ChunkPacer(2.0), random.Random(seed)
    quiet, past, ratios = 0.145, 0, []
    for _ in range(30):
        pacer.note(quiet * rng.lognormvariate(0, 0.12), 4, 0)
    while past < 7000:
        chunk = pacer.chunk(4)
        seconds = quiet + chunk * (0.0022 + past * 5e-7)
        pacer.note(seconds * rng.lognormvariate(0, 0.12), 4, chunk)
        past += chunk
        ratios.append(seconds / quiet)
    assert statistics.median(ratios) <= 2.0
    assert max(ratios) <= 2.5
    assert len(ratios) <= 400, "and the prompt gets on"


def test_it_grows_to_a_large_chunk_by_doubling_at_most() -> None:
    chunks = run(ChunkPacer(2.0), 0.1, 0.0001, 60)
    largest = FIRST_CHUNK
    for chunk in chunks:
        assert chunk <= GROWTH * largest
        largest = max(largest, chunk)
    assert largest > 10 * FIRST_CHUNK


def test_noise_does_not_break_the_bound_by_much() -> None:
    chunks = run(ChunkPacer(2.0), 0.02, 0.0005, 200, jitter=0.1)
    assert all(0.02 + 0.0005 * chunk <= 2.2 * 0.02 for chunk in chunks[20:])


def test_a_long_prompt_always_gets_on() -> None:
    pacer = ChunkPacer(1.01)
    assert set(run(pacer, 0.001, 1.0, 20)[2:]) == {LEAST_CHUNK}


@pytest.mark.parametrize("each", [0.004, 0.0005, 0.001])
def test_it_follows_a_machine_that_becomes_slower_or_faster(each: float) -> None:
    """Always as many streams: what a step costs and what a stream costs cannot be told apart then,
    but what a prompt token costs can."""
    pacer, first, want = ChunkPacer(2.0), MARGIN * 0.1 / 0.001, MARGIN * 0.1 / each
    assert abs(max(run(pacer, 0.1, 0.001, 60)[-2:]) - first) <= 1  # one of two is not shortened
    chunks = run(pacer, 0.1, each, 150)
    assert abs(max(chunks[-2:]) - want) <= 0.1 * want
    again = run(pacer, 0.1, 0.001, 150)
    assert abs(max(again[-2:]) - first) <= 0.1 * first


def test_a_step_of_more_streams_may_have_a_longer_chunk() -> None:
    """10 ms, 1 ms a stream, half a millisecond a prompt token; the allowance is of the step."""
    pacer, rng = ChunkPacer(2.0), random.Random(1)
    for _ in range(301):  # the last chunk is not one of the shorter ones
        streams = rng.randint(1, 32)
        quiet = 0.01 + 0.001 * streams
        pacer.note(quiet, streams, 0)
        chunk = pacer.chunk(streams)
        pacer.note(quiet + 0.0005 * chunk, streams, chunk)
    for streams in (1, 8, 32, 64):
        quiet = 0.01 + 0.001 * streams
        assert pacer.quiet(streams) == pytest.approx(quiet, rel=0.01)
        assert abs(pacer.chunk(streams) - MARGIN * quiet / 0.0005) <= 2


def test_one_slow_step_changes_little() -> None:
    """A page fault, another process: a step of a hundred times the time is taken for three."""
    pacer = ChunkPacer(2.0)
    before = run(pacer, 0.1, 0.001, 100)[-1]
    pacer.note(10.0, 8, before)
    assert pacer.chunk(8) >= before / 2


def test_nobody_waits_for_a_token_of_a_batch() -> None:
    pacer = ChunkPacer(None)
    run(pacer, 0.1, 0.001, 20)
    assert pacer.chunk(8) == pacer.chunk(0) == FIRST_ALONE


def test_free_tokens_do_not_divide_by_zero() -> None:
    """A step with a chunk that took no longer, or less, than a quiet one."""
    for seconds in (0.1, 0.05, 0.0):
        pacer = ChunkPacer(2.0)
        for _ in range(10):
            pacer.note(0.1, 4, 0)
            pacer.note(seconds, 4, 16)
        assert FIRST_CHUNK < pacer.chunk(4) <= GROWTH * FIRST_CHUNK
    pacer = ChunkPacer(2.0)
    for _ in range(10):
        pacer.note(0.0, 4, 0)
    assert LEAST_CHUNK <= pacer.chunk(4) <= GROWTH * FIRST_CHUNK


def test_chunks_without_streams_last_about_a_second() -> None:
    pacer = ChunkPacer(2.0)
    assert pacer.chunk(0) == FIRST_ALONE
    for _ in range(50):
        pacer.note(0.0001 * pacer.chunk(0), 0, pacer.chunk(0))
    assert abs(pacer.chunk(0) * 0.0001 - STEP_S) < 0.01
    for _ in range(50):
        pacer.note(1.0 * pacer.chunk(0), 0, pacer.chunk(0))
    assert pacer.chunk(0) == FIRST_ALONE, "never less than can be afforded anyway"


def test_what_is_not_comparable_is_not_learnt_from() -> None:
    pacer = ChunkPacer(2.0)
    pacer.note(9.0, 0, 3)  # a short prompt alone says nothing of long ones
    assert pacer.pace is None and pacer.chunk(0) == FIRST_ALONE
    pacer.note(0.1, 0, 1000)
    assert abs(pacer.chunk(0) - 10_000) <= 1
    pacer.note(9.0, 4, 16)  # one step beside streams, and nothing to compare it with
    assert pacer.chunk(4) == FIRST_CHUNK


@pytest.mark.parametrize("slowdown", [1.0, 0.5, -1.0])
def test_a_slowdown_of_one_leaves_no_room(slowdown: float) -> None:
    with pytest.raises(ValueError, match="slowdown must be above 1"):
        ChunkPacer(slowdown)
