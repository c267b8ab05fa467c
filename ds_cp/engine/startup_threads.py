"""CPU threads of one rank. No torch here: the agent decides them before the worker starts."""

from __future__ import annotations

import os

from ds_cp.config import Config


def choose_threads(config: Config, local_size: int) -> int:
    """The config's number, or the cores of this process shared evenly among the host's ranks."""
    if config.threads_per_rank != "auto":
        return config.threads_per_rank
    return max(1, len(os.sched_getaffinity(0)) // max(local_size, 1))
