"""Slurm's notations, as pure functions."""

from __future__ import annotations

import re

from ds_cp.errors import TopologyError

# A name, and the ranges in brackets after it.
_PIECE = re.compile(r"([^\[\],]*)(?:\[([^\]]*)\])?")


def expand_nodelist(text: str) -> tuple[str, ...]:
    """``"node[01-03,07],gpu5"`` is node01, node02, node03, node07, gpu5.

    Several brackets in one name multiply: ``"r[1-2]n[1-2]"``. ``TopologyError`` when malformed.
    """
    names: list[str] = []
    for item in _split_outside_brackets(text):
        stems = [""]
        at = 0
        while at < len(item):
            match = _PIECE.match(item, at)
            if match is None or match.end() == at:
                raise _bad_list(text)
            tails = [""] if match[2] is None else _expand_ranges(match[2], text)
            stems = [stem + match[1] + tail for stem in stems for tail in tails]
            at = match.end()
        names += stems
    if not names or not all(names):
        raise _bad_list(text)
    return tuple(names)


def expand_tasks_per_node(text: str) -> tuple[int, ...]:
    """``"2(x2),1"`` is 2, 2, 1: the number of tasks on each node of the step. ``TopologyError``
    when malformed."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise TopologyError(f"Slurm's tasks per node are malformed: {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def step_port(job_id: int, step_id: int) -> int:
    """A port in 20000-29999 that all ranks of one step derive, different for its neighbours."""
    return 20000 + (job_id * 17 + step_id) % 10000


def _split_outside_brackets(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise _bad_list(text)
        if char == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    if depth:
        raise _bad_list(text)
    return [*items, text[start:]]


def _expand_ranges(body: str, text: str) -> list[str]:
    out: list[str] = []
    for part in body.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise _bad_list(text)
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) > 100_000:
            raise _bad_list(text)
        out += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return out


def _bad_list(text: str) -> TopologyError:
    return TopologyError(f"Slurm's node list is malformed: {text[:200]!r}")
