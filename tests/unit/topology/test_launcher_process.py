"""A launcher is known by the program that it runs, and by nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ds_cp.topology.launcher_process import LauncherProcess, launcher_of

ROOT = Path(__file__).resolve().parents[3]
PYTHON = "/opt/venv/bin/python3"


@pytest.mark.parametrize(
    ("launcher", "executable", "argv"),
    [
        ("deepspeed", "python3.11", [PYTHON, "/opt/venv/bin/deepspeed", "--num_gpus", "2", "x.py"]),
        ("deepspeed", "python3.11", [PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--x", "y"]),
        ("deepspeed", "python3", [PYTHON, "-Xdev", "-W", "x", "-um", "deepspeed.launcher.runner"]),
        ("torchrun", "python3.11", [PYTHON, "/opt/venv/bin/torchrun", "--nproc-per-node", "2"]),
        ("torchrun", "python3.11", [PYTHON, "-m", "torch.distributed.run", "x.py"]),
        ("ds-cp", "python3.11", [PYTHON, "/opt/venv/bin/ds-cp", "serve", "--ranks", "2"]),
        ("ds-cp", "python3.11", [PYTHON, "-m", "ds_cp.cli", "serve"]),
        ("mpi", "prterun", ["mpirun", "-np", "2", "python", "x.py"]),
        ("mpi", "orted", ["orted"]),
        ("slurm", "slurmstepd", ["slurmstepd: [17.0]"]),
        (None, "bash", ["/bin/bash", "./my-deepspeed-start.sh"]),
        (None, "bash", ["/bin/bash", "/opt/mpirun"]),
        (None, "dash", ["sh", "-c", "deepspeed launch/serve.py"]),
        (None, "bash", ["bash", "run-ds-cp.sh"]),
        (None, "python3.11", [PYTHON, "/opt/deepspeed-job/start.py", "torchrun"]),
        (None, "python3.11", [PYTHON, "/opt/deepspeed/start.py"]),
        (None, "python3.11", [PYTHON, "-m", "my.torch.distributed.run"]),
        (None, "python3.11", [PYTHON, "-m", "pytest", "-m", "ds_cp.cli"]),
        (None, "python3.11", [PYTHON, "-c", "pass", "deepspeed"]),
        (None, "python3.11", [PYTHON, "-W", "torchrun", "start.py"]),
        (None, "supervisord-mpirun", ["mpirun"]),
        (None, "python3.11", []),
    ],
)  # fmt: skip
def test_by_its_program(launcher: str | None, executable: str, argv: list[str]) -> None:
    assert launcher_of(executable, argv)[0] == launcher


SAY = """
import sys
from ds_cp.topology.launcher_process import launcher_processes
print(*(found.name for found in launcher_processes(sys.argv[1])), sep=",")
"""


def found_below(folder: Path, names: list[str], launcher: str) -> list[str]:
    """The launchers that a process finds which was started through scripts of these names, each by
    the one before: shell scripts where the name ends so, Python's else."""
    file = folder / "rank.py"
    file.write_text(SAY)
    command = [sys.executable, str(file), launcher]
    for name in reversed(names):
        script = folder / name
        if name.endswith(".sh"):
            script.write_text("#!/bin/bash\n" + " ".join(command) + "\necho -n\n")
        else:
            script.write_text(
                f"#!{sys.executable}\nimport subprocess\nsubprocess.run({command!r})\n"
            )
        script.chmod(0o755)
        command = [str(script)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.strip().split(",") if name]


def test_start_scripts_are_no_launchers(tmp_path: Path) -> None:
    """Whatever they are called, above the launcher as below it."""
    scripts = ["my-deepspeed-start.sh", "run-ds-cp.sh"]
    assert found_below(tmp_path, scripts, "deepspeed") == []
    assert found_below(tmp_path, ["torchrun", *scripts], "torchrun") == ["torchrun"]
    assert found_below(tmp_path, [*scripts, "torchrun", "deepspeed"], "deepspeed") == [
        "deepspeed",
        "torchrun",
    ]
    assert found_below(tmp_path, ["deepspeed"], "python") == []  # it set no rank


def test_what_a_process_listens_on_for_others() -> None:
    me = LauncherProcess("me", psutil.Process())
    before = set(me.open_addresses())
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0)) as wide:
        assert set(me.open_addresses()) - before == {f"*:{wide.getsockname()[1]}"}
