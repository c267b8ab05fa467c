"""Every parser of the command: twins in the environment, --json, help; and that a flag wins."""

from __future__ import annotations

import argparse
import json
from functools import cache
from typing import Any

import pytest

from ds_cp.cli import main as cli
from ds_cp.cli.main import build_parser
from ds_cp.cli.parser import Parser, flags, takes_several, twin_of, walk
from ds_cp.errors import LaunchError


@cache
def root() -> Parser:
    """One for all tests: to read arguments leaves a parser as it was."""
    return build_parser()


@cache
def leaves() -> dict[str, Parser]:
    """The parsers that run something, by their words."""
    return {
        " ".join(path): parser
        for path, parser in walk(root())
        if not any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)
    }


def all_flags() -> list[tuple[str, str]]:
    return [(path, a.option_strings[0]) for path, p in leaves().items() for a in flags(p)]


def flag(path: str, name: str) -> tuple[Parser, argparse.Action]:
    parser = leaves()[path]
    return parser, next(a for a in flags(parser) if name in a.option_strings)


def rest_of(path: str, *but: argparse.Action) -> list[str]:
    """The least that a command needs beside some flags."""
    argv = path.split()
    parser = leaves()[path]
    ours = [action.option_strings for action in but]
    groups = [g for g in parser._mutually_exclusive_groups if g.required]
    for group in groups:
        first = group._group_actions[0]
        if not any(a.option_strings in ours for a in group._group_actions):
            argv += [first.option_strings[0], "x"]
    for action in parser._actions:
        if action.required and action.option_strings and action.option_strings not in ours:
            argv += [action.option_strings[0], "7"]
        elif not action.option_strings and action.nargs != "?":
            argv.append(str(next(iter(action.choices))) if action.choices else "x")
    return argv


def read(argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    found = vars(root().read(argv, env))
    return {name: value for name, value in found.items() if name != "verb"}


@pytest.mark.parametrize(("path", "name"), all_flags(), ids=" ".join)
def test_the_twin_of_each_flag_is_as_the_flag(path: str, name: str) -> None:
    parser, action = flag(path, name)
    twin = twin_of(parser.prog, action)
    assert twin == f"DS_CP_{path}_{name[2:]}".upper().replace(" ", "_").replace("-", "_")
    argv = rest_of(path, action)
    value, other = ("1", "0") if action.nargs == 0 else ("7", "8")
    given = [name] if action.nargs == 0 else [name, value]
    by_flag = read([*argv, *given], {})
    assert read(argv, {twin: value}) == by_flag
    assert by_flag[action.dest] not in (None, False)
    assert read([*argv, *given], {twin: other}) == by_flag  # a flag wins
    assert read([*argv, *given], {twin: "\0nonsense"}) == by_flag
    assert action.default != by_flag[action.dest]
    if not action.required and not any(
        action in g._group_actions and g.required for g in parser._mutually_exclusive_groups
    ):
        assert read(argv, {twin: ""}) == read(argv, {})
        assert read(argv, {})[action.dest] == action.default


@pytest.mark.parametrize("path", leaves())
def test_every_command_has_json_and_help_for_each_argument(path: str) -> None:
    parser = leaves()[path]
    found = {name: action for action in flags(parser) for name in action.option_strings}
    assert found["--json"].nargs == 0
    text = " ".join(parser.format_help().split())
    for action in flags(parser):
        assert action.help, action.option_strings
        assert f"[{twin_of(parser.prog, action)}]" in text
    assert all(action.help for action in parser._actions if not action.option_strings)


def test_twins_are_different() -> None:
    twins = [twin_of(p.prog, a) for p in leaves().values() for a in flags(p)]
    assert len(twins) == len(set(twins)) > 100


@pytest.mark.parametrize(
    ("argv", "name", "value", "said"),
    [
        (["serve"], "DS_CP_SERVE_PORT", "x", "DS_CP_SERVE_PORT: invalid int value: 'x'"),
        (["serve"], "DS_CP_SERVE_JSON", "perhaps", "DS_CP_SERVE_JSON is perhaps; it must be 1"),
        (["top"], "DS_CP_TOP_TIMEOUT", "soon", "DS_CP_TOP_TIMEOUT: invalid float value"),
        (
            ["generate", "--prompt", "x"],
            "DS_CP_GENERATE_STOP_TOKEN_IDS",
            "3 x",
            "DS_CP_GENERATE_STOP_TOKEN_IDS: invalid int value: 'x'",
        ),
        (
            ["generate", "--prompt", "x"],
            "DS_CP_GENERATE_STOP",
            "it's",
            "DS_CP_GENERATE_STOP: No closing quotation",
        ),
        (["plan"], "DS_CP_PLAN_HOSTS", "2", "--model, --device, --context"),
        (["serve"], "DS_CP_SERVE_HOST", "x" * (1 << 20 | 1), "DS_CP_SERVE_HOST has 1048577"),
    ],
)
def test_a_wrong_twin_is_named(argv: list[str], name: str, value: str, said: str) -> None:
    with pytest.raises(LaunchError) as err:
        read(argv, {name: value})
    assert said in str(err.value)


def test_several_values_and_switches() -> None:
    env = {
        "DS_CP_GENERATE_STOP": "'a b' c",
        "DS_CP_GENERATE_STOP_TOKEN_IDS": "4 5",
        "DS_CP_GENERATE_IGNORE_EOS": "Yes",
    }
    found = read(["generate", "--prompt", "x"], env)
    assert (found["stop"], found["stop_token_ids"]) == (["a b", "c"], [4, 5])
    assert found["ignore_eos"] is True
    argv = ["generate", "--prompt", "x", "--stop", "z", "--stop-token-ids", "9"]
    found = read(argv, env | {"DS_CP_GENERATE_IGNORE_EOS": "off"})
    assert (found["stop"], found["stop_token_ids"]) == (["z"], [9])  # not added to
    assert found["ignore_eos"] is None


def test_flags_that_exclude_each_other() -> None:
    env = {"DS_CP_GENERATE_PROMPT": "from the environment"}
    assert read(["generate"], env)["prompt"] == "from the environment"
    found = read(["generate", "--prompt-file", "f"], env)
    assert (found["prompt"], found["prompt_file"]) == (None, "f")
    both = env | {"DS_CP_GENERATE_PROMPT_FILE": "g"}
    with pytest.raises(LaunchError, match="DS_CP_GENERATE_PROMPT and .*_FILE do not go together"):
        read(["generate"], both)
    assert read(["generate", "--prompt", "p"], both)["prompt"] == "p"
    with pytest.raises(LaunchError, match="one of the arguments --prompt"):
        read(["generate"], {})


def test_a_required_flag_may_come_from_the_environment() -> None:
    env = {"DS_CP_PLAN_MODEL": "m", "DS_CP_PLAN_DEVICE": "cpu", "DS_CP_PLAN_CONTEXT": "1K"}
    assert read(["plan"], env)["context"] == "1K"
    with pytest.raises(LaunchError, match="--context"):
        read(["plan"], env | {"DS_CP_PLAN_CONTEXT": ""})


def test_what_a_launcher_adds_has_no_twin() -> None:
    found = read(["serve", "--local_rank=3"], {"DS_CP_SERVE_LOCAL_RANK": "5"})
    assert found["local_rank"] == 3 and read(["serve"], {})["local_rank"] is None
    assert not any("LOCAL_RANK" in str(twin_of(p.prog, a)) for p in leaves().values()
                   for a in p._actions)  # fmt: skip


def test_a_command_takes_its_twins(capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("DS_CP_VERSION_JSON", "true")
    assert cli.main(["version"]) == 0
    assert "ds_cp" in json.loads(capfd.readouterr().out)
    monkeypatch.setenv("DS_CP_VERSION_JSON", "?")
    assert cli.main(["version"]) == 2
    assert "DS_CP_VERSION_JSON is ?" in capfd.readouterr().err


def test_repeated_flags_are_known() -> None:
    several = {a.option_strings[0] for p in leaves().values() for a in flags(p) if takes_several(a)}
    assert several == {"--stop", "--stop-token-ids"}
