"""The live picture as text: one letter a request, so that it can be read without colours.

What the server says is shown through ``shorten``, and as text, never as markup.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ds_cp.client.state import Frame
from ds_cp.engine.picture import (
    CACHED,
    FREE,
    RESERVED,
    SHARED,
    Counters,
    EndedPicture,
    Picture,
    RankPicture,
    RequestPicture,
)
from ds_cp.text import shorten

LETTERS = string.ascii_uppercase + string.ascii_lowercase
COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_red", "bright_cyan",
           "bright_green", "bright_magenta", "bright_yellow", "bright_blue", "red")  # fmt: skip
BAR = range(16, 129)  # columns of a KV bar
BESIDE = 44  # columns beside a KV bar
NARROW = 120  # columns below which requests have no names
REASONS = 8  # different reasons that are spelled out
LEGEND = "KV: a letter is a request's, . free, - cached, + shared, * of a request not listed"


def draw(frame: Frame, url: str, width: int) -> RenderableType:
    """A frame of the server at ``url`` for a terminal of ``width`` columns."""
    name = shorten(frame.model or "no model yet", 60)
    length = f", {frame.max_model_len:,} tokens" if frame.max_model_len else ""
    head = Text.assemble((name, "bold"), f"{length}, {shorten(frame.state, 20)}, {url}")
    picture = frame.picture
    if picture is None:
        return Group(head, Text("it shows more once it has loaded its model", style="dim"))
    hosts = {rank.host for rank in picture.ranks}
    count = Text(
        f"{picture.num_ranks} ranks on {len(hosts)} hosts, blocks of {picture.block_size} tokens; "
        f"{picture.num_running} running, {picture.num_waiting} waiting"
    )
    parts: list[RenderableType] = [head, count, *_rates(frame, picture), Text()]
    parts += _ranks(picture, min(max(width - BESIDE, BAR[0]), BAR[-1]))
    parts.append(Text(LEGEND, style="dim"))
    if picture.requests:
        parts += [Text(), _requests(picture, width), *_reasons(picture)]
    if picture.recent:
        parts += [Text(), _ended(picture.recent)]
    return Group(*parts)


def _rates(frame: Frame, picture: Picture) -> list[Text]:
    lines = []
    if (rates := frame.rates) is not None:
        lines.append(Text(
            f"now: {rates.generation_tokens_per_s:,.1f} tokens/s, prefill "
            f"{rates.prefill_tokens_per_s:,.1f} tokens/s, {rates.steps_per_s:,.1f} steps/s, "
            f"wire {_by_scheme(rates.comm_bytes_per_s, '/s')}"
        ))  # fmt: skip
    counts = picture.counters
    lines.append(Text(
        f"all: {counts.generation_tokens:,} tokens, prefill {counts.prefill_tokens:,}, "
        f"prefix cache {_hits(counts)}, {counts.num_preemptions:,} preemptions, "
        f"wire of rank 0 {_by_scheme(counts.comm_bytes)}"
    ))  # fmt: skip
    both: list[RequestPicture | EndedPicture] = [*picture.requests, *picture.recent]
    lines.append(Text(
        f"median of those below: TTFT {_median(r.ttft_s for r in both)}, "
        f"TPOT {_median(r.tpot_s for r in both)}; modes "
        + (", ".join(f"{shorten(m, 20)} {n:,}" for m, n in counts.mode_counts.items()) or "none")
    ))  # fmt: skip
    return lines


def _hits(counts: Counters) -> str:
    if not counts.prefix_cache_queries:
        return "not asked"
    return f"{100 * counts.prefix_cache_hits / counts.prefix_cache_queries:.0f} %"


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return seconds(median(known) if known else None)


def _by_scheme(sent: dict[str, float] | dict[str, int], unit: str = "") -> str:
    parts = [f"{shorten(name, 20)} {size(n)}{unit}" for name, n in sent.items() if n]
    return ", ".join(parts[:8]) or f"0 B{unit}"


def _ranks(picture: Picture, columns: int) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for host, ranks in groupby(picture.ranks, key=lambda rank: rank.host):
        parts.append(Text(f"host {shorten(host, 60)}", style="bold"))
        for rank in ranks:
            line = Text(f"  rank {rank.rank:<3} ")
            line.append_text(bar(rank, len(picture.requests), columns))
            line.append(f" {rank.used:,} of {rank.total:,} used, {rank.cached:,} cached")
            if rank.host_total:
                line.append(f", {rank.host_used:,} of {rank.host_total:,} on the host")
            if rank.state != "open":
                line.append(f", {shorten(rank.state, 20)}", style="bold yellow")
            parts.append(line)
    if picture.num_ranks > len(picture.ranks):
        parts.append(Text(f"and {picture.num_ranks - len(picture.ranks)} ranks more"))
    return parts


def bar(rank: RankPicture, requests: int, columns: int) -> Text:
    """A rank's pool as ``columns`` cells: each shows what lies in the middle of its part."""
    runs = [(what, count) for what, count in rank.cells if count > 0]
    total = sum(count for _, count in runs)
    columns = min(columns, total)
    line, end, at = Text("["), 0, -1
    shown: list[int] = []
    for column in range(columns):
        middle = ((2 * column + 1) * total) // (2 * columns)
        while middle >= end:
            at += 1
            end += runs[at][1]
        shown.append(runs[at][0])
    for what, same in groupby(shown):
        letter, style = _cell(what, requests)
        line.append(letter * len(list(same)), style)
    return line.append("]")


def _cell(what: int, requests: int) -> tuple[str, str]:
    if what == FREE:
        return ".", "dim"
    if what == CACHED:
        return "-", "dim"
    if what == SHARED:
        return "+", "white"
    place = what - RESERVED if what >= RESERVED else what
    if not 0 <= place < min(requests, len(LETTERS)):
        return "*", "white"
    return LETTERS[place], COLOURS[place % len(COLOURS)] + (" dim" if what >= RESERVED else "")


def _requests(picture: Picture, width: int) -> Table:
    """A row each. On a narrow terminal the names are left out: a letter is enough."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=False)
    columns = ["", "request", "phase", "mode", "ranks", "prompt", "answer", "TTFT", "TPOT", "age",
               "why"]  # fmt: skip
    wide = width >= NARROW
    for name in columns:
        if wide or name != "request":
            table.add_column(name, no_wrap=True, overflow="ellipsis")
    for place, request in enumerate(picture.requests):
        letter, style = _cell(place, len(picture.requests))
        table.add_row(
            Text(letter, style), *([Text(shorten(request.id, 22))] if wide else []),
            Text(_phase(request)), Text(_mode(request)), Text(ranges(request.ranks)),
            Text(_prompt(request)), Text(f"{request.new_tokens:,}/{request.max_tokens:,}"),
            Text(seconds(request.ttft_s)), Text(seconds(request.tpot_s)),
            Text(seconds(request.age_s)), Text(_why(request)),
        )  # fmt: skip
    return table


def _why(request: RequestPicture) -> str:
    names = [name for name in (request.span_reason, request.mode_reason) if name]
    return shorten(", ".join(names) or "-", 30)


def _reasons(picture: Picture) -> list[Text]:
    """The reasons in words, each once, with the requests that have it."""
    found: dict[str, list[str]] = {}
    for place, request in enumerate(picture.requests):
        if request.why:
            found.setdefault(request.why, []).append(_cell(place, len(picture.requests))[0])
    lines = [f"{''.join(who):>4}  {shorten(why, 200)}" for why, who in found.items()]
    return [Text(line, style="dim") for line in lines[:REASONS]]


def _phase(request: RequestPicture) -> str:
    return shorten(request.phase, 12) + ("*" if request.working else "")


def _mode(request: RequestPicture) -> str:
    ring_pass = f" {request.ring_pass}" if request.ring_pass else ""
    return shorten(f"{request.mode or '-'}{ring_pass}", 16)


def _prompt(request: RequestPicture) -> str:
    if request.phase == "prefill" and request.to_compute > 0:
        share = 100 * request.computed // request.to_compute
        return f"{request.computed:,}/{request.to_compute:,} {share}%"
    return f"{request.prompt_tokens:,}"


def _ended(recent: Sequence[EndedPicture]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("ended", "by", "modes", "prompt", "answer", "TTFT", "TPOT", "took"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for one in recent:
        table.add_row(
            Text(shorten(one.id, 22)), Text(shorten(one.finish_reason, 12)),
            Text(shorten(" ".join(one.modes), 20)), Text(f"{one.prompt_tokens:,}"),
            Text(f"{one.new_tokens:,}"), Text(seconds(one.ttft_s)), Text(seconds(one.tpot_s)),
            Text(seconds(one.e2e_s)),
        )  # fmt: skip
    return table


def ranges(ranks: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` as ``0-2,5``; of many, the first ones."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    words = [f"{a}" if a == b else f"{a}-{b}" for a, b in found[:6]]
    return ",".join(words) + (",..." if len(found) > 6 else "")


def seconds(value: float | None) -> str:
    """A time for a table."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:,.2f} s"


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
