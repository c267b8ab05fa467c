"""How long memory takes to give a GiB that is in no cache: the fastest of torch's ways to read."""

from __future__ import annotations

from typing import Any

import child
import torch

BYTES = 1 << 30


def start(options: child.Case) -> Any:
    torch.set_num_threads(options["threads"])
    buffer = torch.ones(BYTES // 4, dtype=torch.float32)
    half = buffer.view(2, -1)
    ways = (buffer.sum, lambda: torch.dot(half[0], half[1]), buffer.max)

    def run(case: child.Case) -> child.Case:
        seconds = [min(child.timed(3, way, lambda: None)) for way in ways]
        return {"seconds": [min(seconds)], "bytes": BYTES}

    return run


if __name__ == "__main__":
    child.serve(start)
