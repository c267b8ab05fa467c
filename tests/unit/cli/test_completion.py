"""Completion in the shells themselves, and the page of the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ds_cp.cli import main as cli
from ds_cp.cli.completion import SHELLS
from ds_cp.cli.main import build_parser
from ds_cp.cli.parser import flags
from ds_cp.cli.reference import reference
from tests.unit.cli.test_parser import leaves

ROOT = Path(__file__).resolve().parents[3]
BASH = """
source {script}
ask() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
    _shtab_ds_cp ds-cp "${{COMP_WORDS[-1]}}"
    echo "${{COMPREPLY[*]}}"
}}
"""
ZSH = 'compdef() {{ }}\n_describe() {{ print -l -- ${{(P)2}} }}\neval "$(<{script})"\n'


@pytest.fixture(params=SHELLS)
def shell(request: Any) -> str:
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not here: apt-get install {name}")
    return name


def run(shell: str, script: str, program: str, cwd: Path) -> list[str]:
    plain = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *plain, "-c", program.format(script=script)],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def script(shell: str, capfd: Any, tmp_path: Path) -> str:
    assert cli.main(["completion", shell]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    (tmp_path / "script").write_text(out)
    return str(tmp_path / "script")


def test_the_shell_completes_verbs_kinds_and_flags(shell: str, script: str, tmp_path: Path) -> None:
    """What each shell offers is what the parsers have."""
    verbs = {path.split()[0] for path in leaves()}
    kinds = {path.split()[1] for path in leaves() if path.startswith("bench ")}
    names = {a.option_strings[0] for a in flags(leaves()["bench serve"])}
    if shell == "bash":
        (tmp_path / "my-config.json").write_text("{}")
        program = BASH + (
            'ask ds-cp ""; ask ds-cp bench ""; ask ds-cp bench serve --; ask ds-cp completion z; '
            "ask ds-cp serve --config my-; ask ds-cp be"
        )
        first, second, third, *rest = run(shell, script, program, tmp_path)
        assert rest == ["zsh", "my-config.json", "bench"]
        found = [set(line.split()) for line in (first, second, third)]
    elif shell == "zsh":
        program = ZSH + (
            "_shtab_ds_cp_commands; print; _shtab_ds_cp_bench_commands; print; "
            "print -l -- $_shtab_ds_cp_bench_serve_options"
        )
        text = "\n".join(run(shell, script, program, tmp_path))
        first, second, third = text.split("\n\n")
        assert 'FILE:_files"' in Path(script).read_text()
        found = [{line.split(":")[0] for line in part.split("\n")} for part in (first, second)]
        found.append({line.split("[")[0] for line in third.split("\n")})
    else:
        program = (
            'source {script}; complete -C "ds-cp "; echo; complete -C "ds-cp bench "; echo; '
            'complete -C "ds-cp bench serve --"'
        )
        text = "\n".join(run(shell, script, program, tmp_path))
        found = [{line.split("\t")[0] for line in part.split("\n")} for part in text.split("\n\n")]
    assert found[0] >= verbs and found[1] >= kinds and found[2] >= names
    assert not found[1] - kinds - {"--help", "-h"}


@pytest.mark.parametrize("name", SHELLS)
def test_every_flag_is_in_the_script(name: str, capfd: Any) -> None:
    assert cli.main(["completion", name, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["shell"] == name
    for parser in leaves().values():
        for action in flags(parser):
            option = action.option_strings[0]
            assert (option if name != "fish" else f"-l {option[2:]}") in found["script"], option


def test_an_unknown_shell_is_refused(capfd: Any) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capfd.readouterr().err


def test_the_page_of_the_command_line_is_current() -> None:
    """``python -m ds_cp.cli.reference > docs/cli.md`` writes it."""
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == reference(build_parser())


def test_the_page_has_every_command_and_flag() -> None:
    page = reference(build_parser())
    for path, parser in leaves().items():
        part = page.split(f"\n## `ds-cp {path}")[1].split("\n## ")[0]
        for action in flags(parser):
            assert f"`{action.option_strings[0]}" in part
