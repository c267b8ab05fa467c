"""Clocks of ranks against rank 0's: offsets by messages to and fro, and drift between two looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ds_cp.trace.clocks import Clock, Offset, Ping, offset_of

MS = 1_000_000
DELAYS = st.lists(
    st.tuples(st.integers(1, 50 * MS), st.integers(1, 50 * MS)), min_size=1, max_size=8
)


@given(DELAYS, st.integers(-(10**18), 10**18), st.integers(0, 10**15))
def test_an_offset_is_within_its_error(
    delays: list[tuple[int, int]], offset: int, begin: int
) -> None:
    """The true offset, whatever the two ways take, is as near as the quickest ping says."""
    pings, at = [], begin
    for out, back in delays:
        pings.append(Ping(at, at + out + offset, at + out + back))
        at += out + back
    found = offset_of(pings)
    assert found.error <= min(out + back for out, back in delays) / 2 + 1
    assert abs(found.offset - offset) <= 2 * found.error


@given(DELAYS, st.integers(0, 10**15))
def test_processes_with_one_clock_have_no_offset(delays: list[tuple[int, int]], begin: int) -> None:
    pings, at = [], begin
    for out, back in delays:
        pings.append(Ping(at, at + out, at + out + back))
        at += out + back
    assert offset_of(pings).offset == 0


@given(
    st.integers(-(10**15), 10**15), st.integers(-200, 200), st.integers(10**9, 10**13),
    st.lists(st.integers(0, 10**13), min_size=2, max_size=20),
)  # fmt: skip
def test_drift_is_taken_out(offset: int, ppm: int, span: int, times: list[int]) -> None:
    """A clock that runs ``ppm`` millionths fast, looked at twice: every time between is rank 0's to
    the microsecond, and order is kept."""
    begin = 10**12

    def other(time: int) -> int:
        return time + offset + (time - begin) * ppm // 1_000_000

    first = Offset(begin, other(begin) - begin, 0)
    last = Offset(begin + span, other(begin + span) - begin - span, 0)
    clock = Clock(first, last)
    found = []
    for time in sorted(times):
        true = begin + time % (span + 1)
        assert abs(clock.aligned(other(true)) - true) <= 1000
    for time in sorted(times):
        found.append(clock.aligned(other(begin + time)))
    assert found == sorted(found)
