"""Every example runs as its first lines say. ``test_documents.py`` runs client.py, and what the
documents show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import ROOT, free_port

EXAMPLES = ROOT / "examples"
RUN_S = 150  # a process imports torch and transformers on a machine that may be busy
ALONE = {  # example -> what it must print
    "allocator.py": "token 299 at (1, 43)",
    "attention.py": "rank 0 tree: 100 queries, error to fp64",
    "generate.py": "Gravity is",
    "loaded_model.py": "transformers:",
}


def run(argv: list[str]) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
        timeout=RUN_S, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here() -> None:
    here = {file.name for file in EXAMPLES.glob("*.py")}
    assert here == {*ALONE, "client.py"}
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(name in listed for name in here)


@pytest.mark.parametrize("name", ALONE)
def test_on_one_rank(name: str, smollm2: Path) -> None:
    assert ALONE[name] in run([f"examples/{name}"])


@pytest.mark.parametrize("name", ["attention.py", "generate.py", "loaded_model.py"])
def test_on_two_ranks(name: str, smollm2: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    said = run([*launcher, "--master-port", str(free_port()), f"examples/{name}"])
    assert ALONE[name].replace("100", "25") in said
