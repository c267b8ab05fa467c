"""The chunk pacer on step times from a known machine: so many seconds quiet, so many per token."""

from __future__ import annotations

import random

import pytest

from ds_cp.engine.pacing import (
    FIRST_ALONE,
    FIRST_CHUNK,
    GROWTH,
    LEAST_CHUNK,
    MARGIN,
    STEP_S,
    ChunkPacer,
)


def run(pacer: ChunkPacer, quiet: float, each: float, steps: int, jitter: float = 0.0) -> list[int]:
    """Steps with and without a chunk in turn; the chunks."""
    rng, chunks = random.Random(2), []
    for _ in range(steps):
        noise = 1 + rng.uniform(-jitter, jitter)
        pacer.note(quiet * noise, 8, 0)
        chunks.append(pacer.chunk(True))
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
    assert min(settled) >= max(LEAST_CHUNK, 0.9 * allowed - 1)


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


def test_it_follows_a_machine_that_becomes_slower_or_faster() -> None:
    pacer = ChunkPacer(2.0)
    before = run(pacer, 0.1, 0.001, 60)[-1]
    slower = run(pacer, 0.1, 0.004, 60)[-1]
    faster = run(pacer, 0.1, 0.0005, 120)[-1]
    assert slower < before / 3 and faster > 1.5 * before


def test_free_tokens_do_not_divide_by_zero() -> None:
    """A step with a chunk that took no longer, or less, than a quiet one."""
    pacer = ChunkPacer(2.0)
    pacer.note(0.1, 4, 0)
    pacer.note(0.1, 4, 16)
    pacer.note(0.05, 4, 16)
    assert pacer.slope is not None and pacer.slope > 0
    assert FIRST_CHUNK < pacer.chunk(True) <= GROWTH * FIRST_CHUNK


def test_chunks_without_streams_last_about_a_second() -> None:
    pacer = ChunkPacer(2.0)
    assert pacer.chunk(False) == FIRST_ALONE
    for _ in range(50):
        pacer.note(0.0001 * pacer.chunk(False), 0, pacer.chunk(False))
    assert abs(pacer.chunk(False) * 0.0001 - STEP_S) < 0.01
    for _ in range(50):
        pacer.note(1.0 * pacer.chunk(False), 0, pacer.chunk(False))
    assert pacer.chunk(False) == FIRST_ALONE, "never less than can be afforded anyway"


def test_what_is_not_comparable_is_not_learnt_from() -> None:
    pacer = ChunkPacer(2.0)
    pacer.note(9.0, 0, 3)  # a short prompt alone says nothing of long ones
    assert pacer.pace is None
    pacer.note(9.0, 4, 16)  # nothing to compare it with yet
    assert pacer.slope is None and pacer.chunk(True) == FIRST_CHUNK
    pacer.note(9.0, 0, 0)
    assert pacer.quiet is None


@pytest.mark.parametrize("slowdown", [1.0, 0.5, -1.0])
def test_a_slowdown_of_one_leaves_no_room(slowdown: float) -> None:
    with pytest.raises(ValueError, match="slowdown must be above 1"):
        ChunkPacer(slowdown)
