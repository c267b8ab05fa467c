"""How a process of ours ends. No torch here."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave_process(code: int) -> NoReturn:
    """End this process at once: taking torch down in order needs seconds, and may abort the process
    after a failed collective (``World.leave``). The exit code is 1 instead of 0 when what was
    written cannot be flushed."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader has left, or the disk is full
        code = code or 1
    os._exit(code)
