"""The live picture in letters."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ds_cp.cli.top_picture import bar, draw, ranges, seconds, size
from ds_cp.client.state import Frame, RatesPicture, frame_of
from ds_cp.engine.picture import CACHED, FREE, RESERVED, SHARED, RankPicture
from tests.helpers.pictures import PicturedJob


def shown(frame: Frame, width: int = 200, colours: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=colours,
        highlight=False,
        color_system="standard" if colours else None if colours else None,
    )
    console.print(draw(frame, "http://x:1", width))
    return out.getvalue()


def framed(job: PicturedJob, **changes: Any) -> Frame:
    rates = RatesPicture(12.5, 2048.0, 3.0, {"tree": 8192.0, "ring_kv": 0.0})
    frame = Frame(1.0, "ready", "m/x", 4096, rates, job.picture())
    again = frame_of(msgspec.json.encode(frame))  # as it comes from a server
    assert again == frame
    return replace(again, **changes)


def test_a_job_of_four_ranks_on_two_hosts() -> None:
    job = PicturedJob()
    long, short = job.add(100), job.add(6)
    job.step(3)
    text = shown(framed(job))
    assert "m/x, 4,096 tokens, ready, http://x:1" in text
    assert "4 ranks on 2 hosts, blocks of 4 tokens; 2 running, 0 waiting" in text
    assert "now: 12.5 tokens/s, prefill 2,048.0 tokens/s, 3.0 steps/s, wire tree 8.2 kB/s" in text
    assert "host alpha" in text and "host beta" in text
    picture = job.picture()
    assert [r.id for r in picture.requests][:2] == [long, short]
    for rank in picture.ranks:
        line = next(x for x in text.splitlines() if x.startswith(f"  rank {rank.rank} "))
        assert f"{rank.used} of {rank.total} used, {rank.cached} cached" in line
        cells = line.partition("[")[2].partition("]")[0]
        assert len(cells) == 12  # as many as it has blocks
        wanted = sum(n for what, n in rank.cells if what % RESERVED == 0 and what >= 0)
        assert cells.count("A") == wanted
        assert cells.count(".") == sum(n for what, n in rank.cells if what == FREE)
    for request in picture.requests:
        assert request.id in text and request.why.split(";")[0][:40] in text
        assert ranges(request.ranks) in text


def test_ended_requests_and_a_server_that_starts() -> None:
    job = PicturedJob()
    job.add(8, answer=2)
    for _ in range(8):
        job.step()
    frame = framed(job)
    assert frame.picture is not None and frame.picture.recent
    text = shown(frame)
    assert "length" in text and "took" in text
    text = shown(Frame(1.0, "starting", None, None, None, None))
    assert "no model yet, starting" in text


def test_what_the_server_says_is_text() -> None:
    job = PicturedJob()
    job.add(8)
    job.step()
    frame = framed(job)
    assert frame.picture is not None
    evil = "\x1b[2J\x9b[red]x[/]\n\u202e"
    picture = replace(
        frame.picture,
        ranks=tuple(replace(r, host=evil, state=evil) for r in frame.picture.ranks),
        requests=tuple(
            replace(r, id=evil, phase=evil, mode=evil, ring_pass=evil, why=evil)
            for r in frame.picture.requests
        ),
        counters=replace(frame.picture.counters, mode_counts={evil: 3}, comm_bytes={evil: 5}),
    )
    text = shown(replace(frame, model=evil, state=evil, picture=picture))
    assert "[red]x[/]" in text and not set(text) & set("\x1b\x9b\u202e\r")
    coloured = shown(replace(frame, model=evil, picture=picture), colours=True)
    assert "\x1b[2J" not in coloured and "\x9b" not in coloured


@given(
    st.lists(st.tuples(st.integers(-5, 2000), st.integers(-3, 10**12)), max_size=12),
    st.integers(1, 128),
)
def test_a_bar_has_its_columns_whatever_the_cells(cells: Any, columns: int) -> None:
    """Also cells that no honest server sends: they are not spelled out."""
    rank = RankPicture(0, "h", "open", 0, 0, 0, 1.0, tuple(cells))
    total = sum(n for _, n in cells if n > 0)
    text = bar(rank, 60, columns).plain
    assert text[0] + text[-1] == "[]" and len(text) - 2 == min(columns, total)
    assert set(text[1:-1]) <= set(".-+*ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


def test_a_bar_by_example() -> None:
    cells = ((0, 2), (FREE, 2), (CACHED, 2), (SHARED, 1), (RESERVED + 1, 1), (99, 1), (-4, 1))
    rank = RankPicture(0, "h", "open", 0, 0, 10, 1.0, cells)
    assert bar(rank, 3, 40).plain == "[AA..--+B**]"
    assert bar(rank, 3, 5).plain == "[A.-B*]"


def test_figures() -> None:
    assert ranges(()) == "" and ranges((0, 1, 2, 5)) == "0-2,5"
    assert ranges(tuple(range(0, 40, 2))) == "0,2,4,6,8,10,..."
    assert [seconds(x) for x in (None, 0.0123, 75.5)] == ["-", "12.3 ms", "75.50 s"]
    assert [size(x) for x in (999, 1000, 8_192_000, 5e18)] == [
        "999 B", "1.0 kB", "8.2 MB", "5,000,000.0 TB",
    ]  # fmt: skip
