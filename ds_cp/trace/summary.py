"""What a trace says in a few numbers: by mode, where the time of its exchanges went."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_cp.errors import UserError
from ds_cp.trace.chrome import FORMAT, PRODUCER, pid_of

MAX_BYTES = 1 << 30  # of a file that is read
Interval = tuple[float, float]  # microseconds


class TraceError(UserError):
    """A file is not a trace that ds_cp wrote, or is damaged."""


@dataclass
class ModeSummary:
    """One mode, summed over ranks. Seconds.

    ``attention``: kernels computed; ``folding``: partials were packed and merged; ``posting`` and
    ``waiting``: the computing thread was in an exchange's start, and waited for its end;
    ``under_way``: some exchange of the rank had been posted and not been waited for;
    ``overlapped``: of that, kernels of the mode computed. ``bytes``: sent.
    """

    spans: int = 0
    attention: float = 0.0
    folding: float = 0.0
    posting: float = 0.0
    waiting: float = 0.0
    under_way: float = 0.0
    overlapped: float = 0.0
    bytes: int = 0

    @property
    def overlap(self) -> float | None:
        """The share of the time of exchanges in which kernels computed; None without any."""
        return self.overlapped / self.under_way if self.under_way else None


@dataclass
class TraceSummary:
    """A whole trace. ``about``: what it says of itself; seconds, summed over the ranks that have
    them: ``steps`` and ``model`` (the forward calls within these)."""

    about: dict[str, Any]
    ranks: int
    step_s: float = 0.0
    model_s: float = 0.0
    modes: dict[str, ModeSummary] = field(default_factory=dict)
    sent: dict[int, dict[str, int]] = field(default_factory=dict)  # rank -> scheme -> bytes

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        modes = {
            name: asdict(mode) | {"overlap_share": mode.overlap}
            for name, mode in self.modes.items()
        }
        return {
            "about": self.about, "ranks": self.ranks, "step_s": self.step_s,
            "model_s": self.model_s, "modes": modes,
            "sent_bytes": {str(rank): sent for rank, sent in self.sent.items()},
        }  # fmt: skip


def read_trace(path: str) -> dict[str, Any]:
    """The trace in a file. Raises ``TraceError``."""
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise TraceError(
                f"{path} has {size} bytes, more than {MAX_BYTES}; lower trace.max_events"
            )
        found = json.loads(file.read_bytes())
    except OSError as err:
        raise TraceError(f"cannot read {path}: {err.strerror or err}") from None
    except (ValueError, RecursionError) as err:
        line = (str(err).splitlines() or [""])[0][:200]
        raise TraceError(f"{path} is no trace, or was cut short: {line}") from None
    about = found.get("otherData") if isinstance(found, dict) else None
    if not isinstance(about, dict) or about.get("producer") != PRODUCER:
        raise TraceError(f"{path} is JSON, but not a trace that ds_cp wrote")
    if about.get("format") != FORMAT:
        raise TraceError(
            f"{path} is in format {about.get('format')!r} of a trace; this version reads {FORMAT}"
        )
    trace: dict[str, Any] = found
    return trace


def summarize(trace: dict[str, Any]) -> TraceSummary:
    """The numbers of a trace. Raises ``TraceError`` for one that is damaged."""
    try:
        return _summarize(trace)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise TraceError(f"the trace is damaged ({type(err).__name__}: {err})") from None


def _summarize(trace: dict[str, Any]) -> TraceSummary:
    about = trace["otherData"]
    found = TraceSummary(about, int(about["ranks"]))
    computing: dict[tuple[int, str], list[Interval]] = {}
    flights: dict[tuple[int, str], list[Interval]] = {}
    posted: dict[str, tuple[int, str, float]] = {}  # exchange -> rank, mode, when
    for event in trace["traceEvents"]:
        rank, phase = event["pid"] - pid_of(0), event["ph"]
        if phase == "b":
            posted[event["id"]] = rank, event["args"].get("mode", ""), event["ts"]
        elif phase == "e" and event["id"] in posted:
            rank, mode, begin = posted.pop(event["id"])
            flights.setdefault((rank, mode), []).append((begin, event["ts"]))
        elif phase == "X":
            _span(found, event, computing)
    for (rank, mode), some in flights.items():
        if mode:
            under_way, compute = union(some), union(computing.get((rank, mode), ()))
            entry = found.modes.setdefault(mode, ModeSummary())
            entry.under_way += length(under_way) / 1e6
            entry.overlapped += common_length(under_way, compute) / 1e6
    return found


def _span(
    found: TraceSummary, event: dict[str, Any], computing: dict[tuple[int, str], list[Interval]]
) -> None:
    kind, rank, args = event["cat"], event["pid"] - pid_of(0), event["args"]
    begin, seconds = event["ts"], event["dur"] / 1e6
    if "bytes" in args:
        sent = found.sent.setdefault(rank, {})
        sent[args["scheme"]] = sent.get(args["scheme"], 0) + args["bytes"]
    if kind == "step":
        found.step_s += seconds
    elif kind == "model":
        found.model_s += seconds
    name = args.get("mode", "")
    if not name:
        return
    mode = found.modes.setdefault(name, ModeSummary())
    mode.bytes += args.get("bytes", 0)
    if kind == "mode":
        mode.spans += 1
    elif kind == "attend":
        mode.attention += seconds
        computing.setdefault((rank, name), []).append((begin, begin + event["dur"]))
    elif kind == "fold":
        mode.folding += seconds
    elif kind == "post":
        mode.posting += seconds
    elif kind == "wait":
        mode.waiting += seconds


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that ascend and do not touch."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """How long all of them are."""
    return sum(end - begin for begin, end in intervals)


def common_length(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """How long both are, for two results of ``union``."""
    i = j = 0
    both = 0.0
    while i < len(a) and j < len(b):
        both += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both


def table(found: TraceSummary) -> list[str]:
    """The numbers as lines."""
    about = found.about
    lines = [
        f"{about['steps']} steps on {found.ranks} ranks ({about['device']}): "
        f"{found.step_s:.3f} s of steps, {found.model_s:.3f} s of these in the model, over all "
        "ranks",
    ]
    if about["left_out_steps"]:
        lines.append(f"{about['left_out_steps']} later steps had no room (trace.max_events)")
    if about["device"] != "cpu":
        lines.append("spans are those of the launching thread, not of the device")
    heads = ("mode", "attention s", "posted s", "waited s", "merged s", "under way s", "overlap",
             "sent MB")  # fmt: skip
    rows: list[tuple[str, ...]] = [heads]
    for name, mode in sorted(found.modes.items()):
        overlap = "-" if mode.overlap is None else f"{100 * mode.overlap:.1f} %"
        seconds = (mode.attention, mode.posting, mode.waiting, mode.folding, mode.under_way)
        rows.append((name, *(f"{s:.3f}" for s in seconds), overlap, f"{mode.bytes / 1e6:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
        lines.append("  ".join(cells))
    return lines
