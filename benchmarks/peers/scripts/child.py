"""What every contestant's process does: one JSON line in, one out, until its input ends.

Standard library only, and torch where a contestant has ranks: it runs in the environments of the
peers.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

Case = dict[str, Any]


def serve(start: Callable[[Case], Callable[[Case], Case]]) -> None:
    """Call ``start`` with the first line, then what it returns with each further one. The answers
    go to the standard output as it was found; what libraries print goes to stderr."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Case) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    run: Callable[[Case], Case] | None = None
    for line in sys.stdin:
        try:
            if run is None:
                run = start(json.loads(line))
                answer({})
            else:
                answer(run(json.loads(line)))
        except BaseException as err:
            answer({"error": f"{type(err).__name__}: {err}"[:500]})
            if run is None:
                break
    answers.close()
    os._exit(0)  # threads of a library's own must not keep the process


def _end_with_parent() -> None:
    """Have the system end this process when its parent is killed: it may be stopped then, and would
    stay so. Linux only; elsewhere it ends with its input."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def timed(repeats: int, call: Callable[[], Any], before: Callable[[], Any]) -> list[float]:
    """Seconds of each of ``repeats`` calls; ``before`` each, untimed, ranks meet."""
    seconds = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def join(threads: int) -> Any:
    """torch.distributed over gloo on this machine, by the rank variables; its module."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    return dist


def tokens_of(count: int, seed: int, vocab: int) -> list[int]:
    """A prompt: the same for everyone with the same seed."""
    import random

    draw = random.Random(seed)
    return [draw.randrange(10, vocab) for _ in range(count)]


def share_of_zigzag(rank: int, ranks: int, tokens: int) -> list[tuple[int, int]]:
    """(begin, end) of the two stretches of a sequence that a rank has in zigzag order."""
    part = tokens // (2 * ranks)
    return [(i * part, (i + 1) * part) for i in (rank, 2 * ranks - 1 - rank)]
