"""The bounds of what a connection may send for what it asks, as counters."""

from __future__ import annotations

import pytest

from ds_cp.api.transport.refusal import RefusedError
from ds_cp.api.transport.wire import (
    CHUNK_BYTES,
    FREE_CHUNKS,
    FREE_READS,
    FREE_WIRE_BYTES,
    MAX_HEAD_BYTES,
    MAX_LINES,
    READ_BYTES,
    SMALL_READ_BYTES,
    WIRE_PER_BODY,
    Bounds,
)


def status_of(call: object, *args: object) -> int:
    with pytest.raises(RefusedError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.status


def test_lines_are_counted_anew_for_each_request() -> None:
    bounds = Bounds()
    for _ in range(3):
        bounds.begin()
        for _ in range(MAX_LINES):
            bounds.line()
    assert status_of(bounds.line) == 431


def test_heads_are_bounded_in_bytes_and_whole_requests_are_forgotten() -> None:
    bounds = Bounds()
    for _ in range(5):
        bounds.read(MAX_HEAD_BYTES, in_body=False)
        bounds.whole()
    bounds.read(MAX_HEAD_BYTES, in_body=False)
    assert status_of(bounds.read, 1, False) == 431
    bounds.head(MAX_HEAD_BYTES)
    assert status_of(bounds.head, MAX_HEAD_BYTES + 1) == 431


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, 1000])
def test_chunks_must_pay(size: int) -> None:
    """The number that passes is what the rule says, computed here from its statement."""
    bounds = Bounds()
    passed = 0
    while passed < 50 * FREE_CHUNKS:
        try:
            bounds.chunk()
        except RefusedError:
            break
        bounds.body(size)
        passed += 1
    if size >= CHUNK_BYTES:
        assert passed == 50 * FREE_CHUNKS
    else:
        # n chunks of s bytes pass while (n - 1) s >= (n - free) c
        most = (FREE_CHUNKS * CHUNK_BYTES - size) // (CHUNK_BYTES - size)
        assert passed == min(most, 50 * FREE_CHUNKS)


def test_bytes_around_a_body_must_pay() -> None:
    bounds = Bounds()
    for _ in range(1000):  # a body with as many bytes around it as it has itself
        bounds.body(READ_BYTES // 2)
        bounds.read(READ_BYTES, in_body=True)
    bounds = Bounds()
    body = 10 * READ_BYTES
    bounds.body(body)
    most = FREE_WIRE_BYTES + READ_BYTES + WIRE_PER_BODY * body
    bounds.read(most, in_body=True)
    assert status_of(bounds.read, 1, True) == 400


def test_small_reads_are_slowed_down_after_some() -> None:
    bounds = Bounds()
    for _ in range(FREE_READS):
        bounds.read(1, in_body=True)
        assert bounds.pause_s(1) == 0.0
    bounds.read(1, in_body=True)
    assert 0.0 < bounds.pause_s(1) <= 0.1
    assert bounds.pause_s(SMALL_READ_BYTES) == 0.0  # what fills a read is never slowed down
    bounds.whole()
    assert bounds.pause_s(1) == 0.0
