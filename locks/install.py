"""Install ds_cp with what it needs into the environment of the Python that runs this, each package
checked against a hash: what pip fetches is what this repository was tested with, byte for byte.

    .venv/bin/python locks/install.py [--torch auto|cpu|cuda|any] [--only tools]

Nothing is resolved: the locks name every package, and pip takes no dependency of its own accord.
Builds use the environment's own (checked) setuptools, so that none fetches a builder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
QUICK = ("--no-compile", "--no-build-isolation", "--no-deps")
TORCH = {"cpu": "torch-cpu.txt", "cuda": "torch.txt"}


class RefusedError(Exception):
    """What is to be installed is not what was tested; the words for the user."""


def locked(name: str) -> list[str]:
    """The command that installs what the lock ``name`` lists, and refuses anything else."""
    return [*PIP, *QUICK, "--require-hashes", "-r", str(HERE / name)]


def ours() -> list[str]:
    """The command that installs ds_cp itself, from these files."""
    return [*PIP, *QUICK, "-e", str(ROOT)]


def torch_version() -> str:
    """The version of torch that the locks name, without the mark of a build."""
    first = next(x for x in (HERE / "torch.txt").read_text().splitlines() if x.startswith("torch="))
    return first.split("==")[1].split()[0]


def found_torch() -> tuple[str, str]:
    """Version and sha256 of the build of torch that pip would take here, which is not installed.
    Raises ``RefusedError`` when pip finds none."""
    asked = ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    done = subprocess.run(
        [*PIP, *asked, f"torch=={torch_version()}"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RefusedError(
            f"pip finds no torch {torch_version()} for this Python; its words are above"
        )
    (found,) = json.loads(done.stdout)["install"]
    return found["metadata"]["version"], found["download_info"]["archive_info"]["hashes"]["sha256"]


def torch_commands(build: str) -> list[list[str]]:
    """The commands that install torch. ``build``: ``cpu``, ``cuda``, ``auto`` (the one that pip
    would take here) or ``any`` (that one, unchecked). Raises ``RefusedError`` for one whose hash
    is not known."""
    if build in TORCH:
        return [locked(TORCH[build])]
    version = torch_version()
    if build == "any":
        return [[*PIP, "--no-compile", f"torch=={version}"]]
    found, sha256 = found_torch()
    name = TORCH["cuda" if found == version else "cpu"]
    if f"sha256:{sha256}" not in (HERE / name).read_text():
        raise RefusedError(
            f"pip would install torch {found} with sha256 {sha256}, which locks/{name} does not "
            "list: compare it with what its publisher says and add it there, or install it "
            "unchecked with make install TORCH=any"
        )
    return [locked(name)]


def commands(torch: str) -> Iterator[list[str]]:
    """Everything, in order: torch after deepspeed, whose build would look at it."""
    yield locked("build.txt")
    yield locked("packages.txt")
    yield from torch_commands(torch)
    yield locked("model.txt")
    yield ours()


def main(argv: Sequence[str]) -> int:
    """Run the commands up to the first that fails; its exit code."""
    parser = argparse.ArgumentParser(description="Install ds_cp, every package checked by hash.")
    parser.add_argument("--torch", choices=["auto", "cpu", "cuda", "any"], default="auto")
    parser.add_argument("--only", choices=["tools"], help="the tools of the locks and nothing else")
    args = parser.parse_args(argv)
    if sys.prefix == sys.base_prefix:
        print("ds_cp: locks/install.py wants a virtual environment", file=sys.stderr)
        return 2
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # what setuptools says of editable installs
    try:
        todo = iter([locked("tools.txt")]) if args.only else commands(args.torch)
        for command in todo:
            done = subprocess.run(command, env=quiet, check=False)
            if done.returncode:
                said = " ".join(command[command.index("--quiet") + 1 :])
                print(f"ds_cp: error: pip install {said} failed, see above", file=sys.stderr)
                return done.returncode
    except RefusedError as err:
        print(f"ds_cp: error: {err}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
