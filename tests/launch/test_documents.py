"""What the documents show is run: commands that ask a server, Python, and files that blocks are.

One server is started for all of them, by the README's own command. What is not run, and why, is in
``tests/unit/documents/test_commands.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.documents import (
    ROOT,
    SERVER,
    Block,
    Command,
    all_blocks,
    all_commands,
    blocks_of,
    commands_of,
    guides,
    name_of,
)
from tests.helpers.jobs import BIN, Job, clean_environment, ds_cp, free_port

RUN_S = 150  # a process imports torch and transformers on a machine that may be busy
START = "ds-cp serve --config configs/quickstart.json --ranks 4"
# curl says what the server refused, and fails then.
SHELL = 'set -euo pipefail; curl() { command curl -sS --fail-with-body --max-time 100 "$@"; };'
# Runs each block of a list of Python blocks on its own, in one process: imports take seconds.
ONE_BY_ONE = """
import json, sys
for place, text in json.load(sys.stdin):
    print("----", place, flush=True)
    exec(compile(text, place, "exec"), {"__name__": "__main__"})
"""


def asks(block: Block) -> bool:
    return SERVER in block.text


def documents_that_ask() -> list[Path]:
    return [file for file in guides() if any(asks(b) and b.language in ("sh", "python")
                                             for b in blocks_of(file))]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[str]:
    """The address of the README's four ranks, on a port of their own."""
    assert any(command.text.startswith(START) for command in all_commands())
    job = Job([*ds_cp(), *START.split()[1:], "--port", "0"], tmp_path_factory.mktemp("server"))
    try:
        yield job.ready()
    finally:
        job.process.terminate()
        job.process.wait(60)
        job.close()


def run(argv: list[str], given: str | None = None, folder: Path = ROOT) -> str:
    done = subprocess.run(
        argv, cwd=folder, input=given, capture_output=True, text=True, timeout=RUN_S,
        env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, f"{argv}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def shell(text: str) -> str:
    return run(["bash", "-c", f"{SHELL} {text}"])


@pytest.mark.parametrize("file", documents_that_ask(), ids=name_of)
def test_what_asks_a_server(file: Path, server: str) -> None:
    """In the document's order: what it drains it opens again."""
    for block in filter(asks, blocks_of(file)):
        here = Block(block.file, block.line, block.language, block.text.replace(SERVER, server))
        if block.language == "python":
            said = run([sys.executable, "-"], here.text)
            assert said, block.place
            if "vault" in block.text:
                check_long_document(said)
        elif block.language == "sh":
            for command in commands_of(here):
                if server in command.text:
                    check_answer(command, shell(command.text))


def check_answer(command: Command, said: str) -> None:
    assert said, command
    if "capital of France" in command.text:
        assert "Paris" in said


def check_long_document(said: str) -> None:
    """No rank holds it; the code at its beginning is found, the second question is in the cache."""
    assert "7431" in said.splitlines()[0]
    (tokens, _), (more, cached) = (map(int, line.split()) for line in said.splitlines()[1::2])
    assert 6000 < tokens < 8192 - 8 and tokens > 3 * 2048, "three ranks are not enough"
    assert 0 <= more - cached < 128


def test_the_probe_of_the_manifest(server: str) -> None:
    """The readiness that Kubernetes asks for, against this server and against none."""
    [pods] = [d for d in yaml.safe_load_all((ROOT / "configs/kubernetes/ds-cp.yaml").read_text())
              if d["kind"] == "StatefulSet"]  # fmt: skip
    [container] = pods["spec"]["template"]["spec"]["containers"]
    code = container["readinessProbe"]["exec"]["command"][2]
    dead = f"http://127.0.0.1:{free_port()}"
    for address, index, ready in ((server, "0", True), (dead, "0", False), (dead, "1", True)):
        done = subprocess.run(
            [sys.executable, "-c", code.replace(SERVER, address)], capture_output=True,
            timeout=RUN_S, env={**clean_environment(), "POD_INDEX": index},
        )  # fmt: skip
        assert (done.returncode == 0) == ready, done.stderr


def test_python_alone(smollm2: Path) -> None:
    """Every such block of every document, one after the other in one process."""
    import json

    blocks = [b for b in all_blocks("python") if not asks(b) and not b.script]
    assert len(blocks) >= 4
    texts = [(b.place, textwrap.dedent(b.text)) for b in blocks]
    said = run([sys.executable, "-c", ONE_BY_ONE], json.dumps(texts))
    [readme] = [i for i, b in enumerate(blocks) if name_of(b.file) == "README.md"]
    parts = re.split(r"^---- .*$", said, flags=re.MULTILINE)[1:]
    assert len(parts) == len(blocks)
    assert len(parts[readme].split()) > 5, said


SCRIPTS = [c for c in all_commands()
           if {b.script for b in blocks_of(c.block.file) if b.script} & set(c.words)]  # fmt: skip


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda command: command.text)
def test_blocks_that_are_files(command: Command, tmp_path: Path) -> None:
    """Each is saved under its name, and started as the document says, with a free port."""
    for block in blocks_of(command.block.file):
        if block.script:
            (tmp_path / block.script).write_text(block.text)
    program, *words = command.words
    if program == "torchrun":
        words = ["--master-port", str(free_port()), *words]
    said = run([str(BIN / program), *words], folder=tmp_path)
    assert said.count("largest difference") == int(words[words.index("--nproc-per-node") + 1])


def test_the_batch_script_asks_slurm_for_what_it_says(tmp_path: Path) -> None:
    """With stand-ins for srun and scontrol that print their arguments."""
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "launch/slurm.sbatch"), "configs/gpu_cluster.json"],
        capture_output=True, text=True, timeout=RUN_S, cwd=ROOT,
        env={"PATH": f"{tmp_path}{os.pathsep}/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]",
             "SLURM_CPUS_PER_TASK": "8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "srun --kill-on-bad-exit=1 --cpus-per-task=8 python ./launch/serve.py "
        "--config configs/gpu_cluster.json"
    )
