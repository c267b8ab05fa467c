"""Imported by every Python process of a job under test, whose PYTHONPATH names this folder first:
SIGUSR1 makes the next call of an attention kernel raise, SIGUSR2 moves what ``time.time`` says by
an hour, forth and back. Nothing in ds_cp knows of it."""

import contextlib
import signal
import sys
import time

_HOUR_S = 3600.0
_true_time = time.time
_shift = 0.0


def _raise_once(signum, frame):
    module = sys.modules.get("ds_cp.attention.kernels.cpu")
    if module is None:
        return
    kernel = module.CpuKernel
    names = ("paged_attention", "attending")
    kept = {name: kernel.__dict__[name] for name in names if name in kernel.__dict__}

    def failing(self, *args, **kwargs):
        for name, method in kept.items():
            setattr(kernel, name, method)
        raise RuntimeError("an attention kernel failed (a fault that was injected)")

    for name in kept:
        setattr(kernel, name, failing)


def _jump(signum, frame):
    global _shift
    _shift = -_HOUR_S if _shift > 0 else _shift + _HOUR_S
    time.time = lambda: _true_time() + _shift


with contextlib.suppress(ValueError, OSError):
    signal.signal(signal.SIGUSR1, _raise_once)
    signal.signal(signal.SIGUSR2, _jump)
