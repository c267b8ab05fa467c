"""Every command and every block of the documents is run by a test or checked by its own parser.

``CHECKED`` names what is not run, and why. What no rule names is run: commands that ask a server,
``ds-cp`` commands that need none, Python. ``tests/launch/test_documents.py`` runs them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import yaml

from ds_cp.cli.main import main
from ds_cp.config import load_config
from tests.helpers import documented_checks as checks
from tests.helpers.documents import (
    LANGUAGES,
    ROOT,
    SERVER,
    Block,
    Command,
    all_blocks,
    all_commands,
    inline_commands,
    looks_like_command,
    name_of,
)


@dataclass(frozen=True)
class Rule:
    """Commands that begin with ``pattern`` are not run, for a ``reason``, and checked instead."""

    pattern: str
    reason: str
    check: Callable[[Command], None]


SERVES = "starts a server for good; test_launchers.py starts every launcher, with the tiny model"
NO_SLURM = "needs a Slurm; tests/clusters starts one of its own, and the same commands in it"
CHECKED = (
    Rule(r"make \w", "installs, serves or runs all tests; .ci/run begins with make test",
         checks.check_make),
    Rule(r"python3 -m venv |pip |\.venv/bin/(pip |python locks/)",
         "installs packages; make install does the same",
         lambda command: checks.check_pip(command) if "pip" in command.text else None),
    Rule(r"\.venv/bin/python -m ds_cp\.model\.smollm2 ", "make model runs it",
         checks.check_python),
    Rule(r"(\.venv/bin/)?deepspeed ", SERVES, checks.check_deepspeed),
    Rule(r"mpirun ", SERVES, checks.check_mpirun),
    Rule(r"torchrun .*(launch/|ds_cp\.cli|examples/)",
         SERVES + "; test_examples.py runs the examples", checks.check_torchrun),
    Rule(r"srun |salloc ", NO_SLURM, checks.check_srun),
    Rule(r"(sbatch|scancel|squeue) ", NO_SLURM, checks.check_files),
    Rule(r"kubectl ", "needs a cluster; test_kubernetes.py checks what it applies, and"
         " tests/clusters starts the pods",
         checks.check_files),
    Rule(r"(ssh|scp|pdsh) ", "there is no such host", checks.check_files),
    Rule(r"python launch/", SERVES, checks.check_python),
    Rule(r"python examples/(?!client)", "test_examples.py runs it", checks.check_python),
    Rule(r"python -m (benchmarks|ds_cp)\.", "takes minutes, or compiles; a test of its own runs it",
         checks.check_python),
    Rule(r"ds-cp serve ", SERVES, checks.check_ds_cp),
    Rule(r"ds-cp (generate|batch) ", "starts ranks; test_launchers.py and test_contracts.py do so",
         checks.check_ds_cp),
)  # fmt: skip
OFFLINE = re.compile(r"ds-cp (config|plan|version|doctor)( |$)")  # run here, in this process
KEYED = "sed "  # makes the config of the manifest; test_kubernetes.py runs it


def rules_of(command: Command) -> list[Rule]:
    return [rule for rule in CHECKED if re.match(rule.pattern, command.text)]


def is_run(command: Command) -> bool:
    """Whether tests/launch/test_documents.py or this file runs it."""
    script = next((b.script for b in all_blocks("python") if b.script in command.words), None)
    alone = OFFLINE.match(command.text) or command.text.startswith(KEYED)
    return bool(SERVER in command.text or alone or script)


def test_every_command_is_run_or_has_one_reason_why_not() -> None:
    assert len(all_commands()) > 40
    wrong = [
        f"{command} ({len(rules_of(command))} rules, {'' if is_run(command) else 'not '}run)"
        for command in all_commands()
        if len(rules_of(command)) + is_run(command) != 1
    ]
    assert wrong == []


def test_every_reason_is_needed() -> None:
    used = {rule for command in all_commands() for rule in rules_of(command)}
    assert [rule.pattern for rule in CHECKED if rule not in used] == []


@pytest.mark.parametrize("rule", CHECKED, ids=lambda rule: rule.pattern)
def test_what_is_not_run_is_checked(rule: Rule) -> None:
    for command in all_commands():
        if rules_of(command) == [rule]:
            rule.check(command)


@pytest.mark.parametrize(
    "command", [c for c in all_commands() if OFFLINE.match(c.text)], ids=lambda c: c.text
)
def test_commands_without_ranks(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(command.words[1:]) == 0, capsys.readouterr()
    assert capsys.readouterr().out


@pytest.mark.parametrize("program", ["ds-cp", "make", "python"])
def test_commands_within_sentences(program: str) -> None:
    faults = {
        f"{place}: {text}": fault
        for place, text in inline_commands(program)
        if (fault := checks.inline_faults(program, text))
    }
    assert faults == {}


def test_every_block_has_a_known_language_and_hides_no_command() -> None:
    unknown = [(b.place, b.language) for b in all_blocks() if b.language not in LANGUAGES]
    assert unknown == []
    hidden = [
        f"{block.place}: {line}"
        for block in all_blocks("text")
        for line in block.text.splitlines()
        if looks_like_command(line)
    ]
    assert hidden == []


@pytest.mark.parametrize("block", all_blocks("python"), ids=lambda block: block.place)
def test_python_names_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ds_cp"):
            module = __import__(str(node.module), fromlist=["x"])
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("block", all_blocks("json"), ids=lambda block: block.place)
def test_json_is_valid_and_a_config_if_it_has_a_model(block: Block) -> None:
    content = json.loads(block.text)
    if isinstance(content, dict) and {"model", "messages", "prompt"} & set(content) == {"model"}:
        load_config(content)


def test_yaml_is_valid() -> None:
    for block in all_blocks("yaml"):
        assert list(yaml.safe_load_all(block.text)), block.place


def test_the_readme_has_six_lines_of_python_to_run() -> None:
    """``tests/launch/test_documents.py`` runs them."""
    readme = [b for b in all_blocks("python") if name_of(b.file) == "README.md"]
    [block] = [b for b in readme if "init_inference" in b.text]
    assert len(block.text.splitlines()) == 6


def test_files_named_by_blocks_are_started() -> None:
    started = {word for command in all_commands() for word in command.words}
    assert {b.script for b in all_blocks("python") if b.script} <= started
