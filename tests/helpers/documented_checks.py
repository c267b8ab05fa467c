"""How a command of the documents is checked where no test runs it: by its program's own parser.

Each check raises ``AssertionError`` or the parser's own error. None starts anything but ``make -n``
and Open MPI's mapper.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ds_cp.cli.main import build_parser
from ds_cp.config import load_config
from tests.helpers.documents import ROOT, Command, blocks_of
from tests.helpers.jobs import BIN

CHECK_S = 60  # a program that only reads its command line, on a busy machine
# Options of srun in Slurm's manual (man srun), which take a value after a blank or "=".
_SRUN = ("-n", "--ntasks", "-N", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--mpi")


def check_make(command: Command) -> None:
    """Make knows the target and everything that it needs."""
    done = subprocess.run(
        ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True,
        timeout=CHECK_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stderr}"


def check_ds_cp(command: Command) -> None:
    """The command line takes the arguments, and the configs in the repository are valid."""
    _check_ds_cp(command.words[1:])


def check_python(command: Command) -> None:
    """``python FILE``, ``python -m MODULE``: the program is there; ours takes the arguments."""
    _check_script(command, command.words[1:])


def check_pip(command: Command) -> None:
    """Files that pip reads are there, and so are the extras of this package."""
    words = command.words[1:]
    assert words[0] in ("install",), command
    for flag, value in zip(words, words[1:], strict=False):
        assert flag != "-c" or (ROOT / value).is_file(), command
    setup = (ROOT / "setup.py").read_text("utf-8")
    for extras in re.findall(r"(?:ds_cp|\.)\[([\w,]+)\]", command.text):
        assert all(f'"{extra}": ' in setup for extra in extras.split(",")), command


def check_deepspeed(command: Command) -> None:
    """deepspeed's parser takes its part and reads the hostfile, ours takes the rest."""
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    words = command.words[1:]
    args = parse_args(words)
    if "--hostfile" in words:
        hosts = fetch_hostfile(str(_file(command, args.hostfile)))
        assert hosts and all(slots > 0 for slots in hosts.values()), command
    _check_script(command, [args.user_script, *args.user_args])


def check_torchrun(command: Command) -> None:
    """torchrun's parser takes its part, ours the rest."""
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(command.words[1:])
    start = ["-m"] if args.module else []
    _check_script(command, [*start, args.training_script, *args.training_script_args])


def check_mpirun(command: Command) -> None:
    """Open MPI maps the ranks on the hosts, and starts nothing."""
    words = command.words[1:]
    at = next(i for i, word in enumerate(words) if Path(word).name.startswith("python"))
    own = words[:at]
    if "--hostfile" in own:
        place = own.index("--hostfile") + 1
        own[place] = str(_file(command, own[place]))
    ranks = int(own[own.index("-np") + 1])
    hosts = "--hostfile" in own or "--host" in own
    flags = ["--allow-run-as-root", "--do-not-launch", *([] if hosts else ["--oversubscribe"])]
    done = subprocess.run(
        [str(BIN / "mpirun"), *flags, *own, *words[at:]], cwd=ROOT, capture_output=True, text=True,
        timeout=CHECK_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert done.stdout.count("Data for proc:") == ranks, f"{command}\n{done.stdout}"
    _check_script(command, words[at + 1 :])


def check_srun(command: Command) -> None:
    """Options of srun's manual; our parser takes the rest."""
    words = command.words[1:]
    while words and words[0].startswith("-"):
        name, has_value, _ = words.pop(0).partition("=")
        assert name in _SRUN or name == "--kill-on-bad-exit", f"{command}: {name}"
        if not has_value and name in _SRUN:
            words.pop(0)
    assert Path(words[0]).name.startswith("python"), command
    _check_script(command, words[1:])


def check_files(command: Command) -> None:
    """Every path in the repository that the command names is there."""
    for word in command.words[1:]:
        path = word.rpartition("=")[2]
        if path.partition("/")[0] in ("configs", "launch", "docs", "examples"):
            assert (ROOT / path).exists(), command


def _check_script(command: Command, words: Sequence[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), command
        if words[1] == "ds_cp.cli":
            _check_ds_cp(words[2:])
        return
    if words[0] in _scripts(command):
        return
    assert (ROOT / words[0]).is_file(), command
    if words[0].startswith("launch/"):
        _check_ds_cp([Path(words[0]).stem, *words[1:]])


def _check_ds_cp(words: Sequence[str]) -> None:
    args = build_parser().parse_args(list(words))
    config = getattr(args, "config", None)
    for file in [config] if config else getattr(args, "files", []):
        if file.startswith("configs/"):
            load_config(ROOT / file)


def _scripts(command: Command) -> list[str]:
    """Files that earlier blocks of the document are."""
    blocks = blocks_of(command.block.file)
    return [b.script for b in blocks if b.script and b.line < command.block.line]


def _file(command: Command, name: str) -> Path:
    """A file of the repository that a command names."""
    file = ROOT / name
    assert file.is_file(), f"{command}: no {name}"
    return file


def inline_faults(program: str, text: str) -> str:
    """What is wrong with a command within a sentence, which may leave arguments out; empty when
    its target, module, verb and flags are there."""
    words = [word for word in text.split()[1:] if word not in ("|", "...")]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        wrong = [w for w in words if re.fullmatch(r"[a-z-]+", w) and f"\n{w}:" not in makefile]
        return f"no target {wrong}" if wrong else ""
    if program == "python":
        there = words[0] != "-m" or importlib.util.find_spec(words[1])
        return "" if there else f"no module {words[1]}"
    parser = build_parser()
    while words and words[0].isalpha() and words[0].islower():
        verbs = [a.choices for a in parser._actions if isinstance(a.choices, dict)]
        if not verbs:
            break
        if words[0] not in verbs[0]:
            return f"no verb {words[0]}"
        parser = verbs[0][words.pop(0)]
    flags = {flag for action in parser._actions for flag in action.option_strings}
    wrong = [w for w in words if w.startswith("--") and w.partition("=")[0] not in flags]
    return f"no flag {wrong}" if wrong else ""
