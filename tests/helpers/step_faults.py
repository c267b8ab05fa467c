"""Faults in the steps of a real worker process, by a file that Python reads at its start; nothing
of it is in the product.

A request asks for a fault by its prompt: ``prompt_of(kind)``. The rank that computes its tokens
has it.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("raise_once", "no_memory", "nan", "kill")
IN_A_ROW = 3  # that many equal tokens are a fault's mark; a chunk has 4 at least

# Waits for the module of the worker, and puts itself around its forward call.
SITECUSTOMIZE = """
import importlib.util, os, signal, sys

KINDS, IN_A_ROW, ONCE = {kinds!r}, {in_a_row}, {once!r}

def wanted(ids):
    for number, kind in enumerate(KINDS, 1):
        if any(ids[i:i + IN_A_ROW] == [number] * IN_A_ROW for i in range(len(ids))):
            return kind

def once():
    try:
        os.close(os.open(ONCE, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def patch(module):
    import torch
    Worker, StepContext = module.Worker, module.StepContext
    forward, attend, armed = Worker._forward, StepContext.attend, []

    def attend_or_raise(self, layer, *qkv):
        if armed and layer == 1:
            armed.clear()
            raise RuntimeError("made up, in a kernel")
        return attend(self, layer, *qkv)

    def forward_or_fail(self, step, kind):
        fault = wanted(step.ids.flatten().tolist())
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "no_memory":
            torch.empty(1 << 55)
        if fault == "raise_once" and once():
            armed.append(True)
        logits = forward(self, step, kind)
        for row, draw in enumerate(step.draws):
            if wanted(list(draw.sequence.tokens)) == "nan":
                logits = logits.clone()
                logits[row] = float("nan")
        return logits

    Worker._forward, StepContext.attend = forward_or_fail, attend_or_raise

class Finder:
    def find_spec(self, name, path, target=None):
        if name != "ds_cp.worker.worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec

if "ds_cp.serve.worker_process" in sys.orig_argv:
    sys.meta_path.insert(0, Finder())
"""


def faulty_environment(folder: Path) -> dict[str, str]:
    """With which a job's workers have the faults that requests ask for."""
    text = SITECUSTOMIZE.format(kinds=KINDS, in_a_row=IN_A_ROW, once=str(folder / "once"))
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def prompt_of(kind: str) -> list[int]:
    """A prompt of token ids whose steps have this fault."""
    return [KINDS.index(kind) + 1] * 12 + [70, 71, 72]
