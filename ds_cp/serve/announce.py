"""How rank 0 says that requests are served."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TextIO

# Is given what start-up decided, a line each, and the addresses, joined by " and ".
Announce = Callable[[Sequence[str], str], None]


def print_ready(summary: Sequence[str], addresses: str) -> None:
    """In lines for people."""
    for line in summary:
        print(line)
    print(f"ds_cp ready: {addresses}", flush=True)


def ready_as_json(out: TextIO) -> Announce:
    """As one object on ``out``; where that cannot be written, the server goes on."""

    def announce(summary: Sequence[str], addresses: str) -> None:
        ready = {"ready": True, "urls": addresses.split(" and "), "summary": list(summary)}
        try:
            out.write(json.dumps(ready) + "\n")
            out.flush()
        except (OSError, ValueError):
            pass

    return announce
