"""The results of the clients as a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: written by benchmarks.clients -->", "<!-- end -->"
_CELLS = {"ok": "ok", "none": "-", "failed": "**failed**"}

Result = Mapping[str, Any]  # of one client: name, versions, rows, sent, taken


def page(results: Sequence[Result], facts: Mapping[str, Any]) -> str:
    """The tables between the markers."""
    when = sorted({result["taken"] for result in results})
    how = f"{facts['model']} on {facts['ranks']} ranks, {facts['machine']}"
    return "\n\n".join(
        [f"Taken {'; '.join(when)}; {how}.", _matrix(results), _remarks(results), _sent(results)]
    )


def write(file: Path, text: str) -> None:
    """Put ``text`` between the markers of ``file``. Raises ``ValueError`` without them."""
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{file} has no lines {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _matrix(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(row["check"] for each in results for row in each["rows"]))
    heads = [f"{result['name']} {result['version']}" for result in results]
    lines = [_line(["", *heads]), _line(["---"] * (len(heads) + 1))]
    columns = [{row["check"]: row["result"] for row in result["rows"]} for result in results]
    lines += [
        _line([name, *(_CELLS[column.get(name, "none")] for column in columns)]) for name in names
    ]
    return "\n".join(lines)


def _remarks(results: Sequence[Result]) -> str:
    lines = ["What was not ok:", ""]
    for result in results:
        for row in result["rows"]:
            if row["result"] == "failed":
                why = row["detail"].replace("|", "/")[:200]
                lines.append(f"- {result['name']}, {row['check']}: {row['result']}: `{why}`")
    return "\n".join(lines) if len(lines) > 2 else "Everything was ok."


def _sent(results: Sequence[Result]) -> str:
    lines = ["What each client sends for a plain chat and for a stream:", ""]
    lines += [_line(["client", "route", "fields", "headers of its own"]), _line(["---"] * 4)]
    for result in results:
        for sent in result["sent"]:
            fields = ", ".join(f"`{field}`" for field in sent["fields"])
            families = {re.sub(r"^x-stainless-.*", "x-stainless-*", h) for h in sent["headers"]}
            headers = ", ".join(f"`{header}`" for header in sorted(families))
            lines.append(
                _line([result["name"], f"{sent['method']} {sent['path']}", fields, headers])
            )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
