"""A trace file in Chrome's JSON format, which Perfetto (https://ui.perfetto.dev) opens.

One process a rank, with one track of nested spans (its computing thread) and, beside it, each
exchange from the moment it is posted until it has been waited for. Times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from ds_cp.trace.recorder import Kind, Record

PRODUCER = "ds_cp"
FORMAT = 1  # of what is in the file
TITLES = {Kind.POST: "post", Kind.WAIT: "wait"}  # before the name


def pid_of(rank: int) -> int:
    """A rank's process and thread in the file. To Perfetto, 0 is the idle process."""
    return rank + 1


class TraceFile:
    """Writes a trace, rank by rank, a line an event. ``about``: what is said of the whole.

    ``end`` completes it: without it the file is no JSON.
    """

    def __init__(self, out: TextIO, about: Mapping[str, Any]) -> None:
        self._out = out
        head = {"producer": PRODUCER, "format": FORMAT, **about}
        out.write('{"displayTimeUnit":"ms","otherData":' + json.dumps(head))
        out.write(',"traceEvents":[')
        self._comma = "\n"

    def rank(
        self, rank: int, host: str, names: tuple[str, ...], records: Iterable[Record],
        aligned: Callable[[int], int],
    ) -> int:  # fmt: skip
        """One rank's spans; ``aligned`` gives nanoseconds since the beginning of the trace. Returns
        the number of records."""
        self._event({"ph": "M", "name": "process_name", "pid": pid_of(rank),
                     "args": {"name": f"rank {rank} on {host}"}})  # fmt: skip
        self._event({"ph": "M", "name": "process_sort_index", "pid": pid_of(rank),
                     "args": {"sort_index": rank}})  # fmt: skip
        self._event({"ph": "M", "name": "thread_name", "pid": pid_of(rank), "tid": pid_of(rank),
                     "args": {"name": "computing thread"}})  # fmt: skip
        count = 0
        for record in records:
            count += 1
            for event in events_of(rank, names, record, aligned):
                self._event(event)
        return count

    def _event(self, event: Mapping[str, Any]) -> None:
        self._out.write(self._comma + json.dumps(event, separators=(",", ":")))
        self._comma = ",\n"

    def end(self) -> None:
        """The end of the file."""
        self._out.write("\n]}\n")


def events_of(
    rank: int, names: tuple[str, ...], record: Record, aligned: Callable[[int], int]
) -> Iterator[dict[str, Any]]:
    """The events of one record: a span, and of an exchange its begin or its end."""
    kind, name, mode = Kind(record.kind), names[record.name], names[record.mode]
    begin, end, pid = aligned(record.begin), aligned(record.end), pid_of(rank)
    args: dict[str, Any] = {"mode": mode} if mode else {}
    label = name
    if kind in TITLES:
        scheme, _, peers = name.partition(" ")
        label = f"{TITLES[kind]} {scheme}"
        args |= {"scheme": scheme, "exchange": record.number}
        about = {
            "cat": "exchange", "id": f"{rank}.{record.number}", "pid": pid, "tid": pid,
            "name": scheme,
        }  # fmt: skip
        if kind is Kind.POST:
            args |= {"bytes": record.value, "peers": peers}
            yield {"ph": "b", "ts": begin / 1000, **about, "args": args}
        else:
            yield {"ph": "e", "ts": end / 1000, **about}
    elif kind is Kind.HOST:
        args |= {"blocks": record.number, "bytes": record.value}
    elif kind is Kind.SUM:
        args |= {"scheme": name, "bytes": record.value}
    elif kind is Kind.STEP:
        args["step"] = record.number
        label = f"step {record.number}"
    elif kind is Kind.LAYER:
        args["layer"] = record.number
        label = f"attention of layer {record.number}"
    yield {
        "ph": "X", "cat": kind.name.lower(), "name": label, "pid": pid, "tid": pid,
        "ts": begin / 1000, "dur": (end - begin) / 1000, "args": args,
    }  # fmt: skip
