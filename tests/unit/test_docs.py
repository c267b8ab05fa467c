"""What the documents promise is there: files, links, lines of Python that parse."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ds_cp", "launch", "tests", "benchmarks", "examples", "configs", "docs", ".github")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]+\w")
ROOM = re.compile(r"`([a-z_]+/[a-z_/]+\.py)`")  # a file named from within the package
ELSEWHERE = {"FORMULAS", "SURFACES", "PITFALLS", "HOUSE", "STYLE", "ARCHITECTURE"}


@cache
def documents() -> list[Path]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    return sorted([*found, *ROOT.glob("benchmarks/results/*.md"), *ROOT.glob(".github/*.md")])


def texts() -> list[Path]:
    folders = ("ds_cp", "launch", "tests", "benchmarks", "examples")
    code = [file for folder in folders for file in ROOT.glob(f"{folder}/**/*.py")]
    return [*documents(), *code, ROOT / "Makefile", ROOT / "setup.py", ROOT / "pyproject.toml"]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", documents(), ids=name_of)
def test_links_and_paths_lead_somewhere(file: Path) -> None:
    text = file.read_text("utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (file.parent / link).exists()]
    if file.name != "CHANGELOG.md":  # it speaks of the past
        missing += [path for path in PATH.findall(text) if not list(ROOT.glob(path))]
        rooms = [(ROOT / "ds_cp" / path, ROOT / path) for path in ROOM.findall(text)]
        missing += [str(a) for a, b in rooms if not a.exists() and not b.exists()]
    assert missing == []


def test_nothing_cites_a_document_that_a_reader_cannot_have() -> None:
    phrases = re.compile(
        rf"\b(?:{'|'.join(sorted(ELSEWHERE))})\b|\bthe first sketch\b|\bin the design\b"
        r"|\bthe issue (?:asks|says|wants)\b"
    )
    found = []
    for file in texts():
        if file == Path(__file__):
            continue
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if phrases.search(line):
                found.append(f"{name_of(file)}:{number}: {line.strip()[:100]}")
    assert found == []


def python_blocks(file: Path) -> list[str]:
    """Indented blocks that begin with an import."""
    blocks, block = [], []
    for line in [*file.read_text("utf-8").splitlines(), "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line[4:])
            continue
        if block and re.match(r"(import|from) ", block[0]):
            blocks.append("\n".join(block).strip() + "\n")
        block = []
    return blocks


@pytest.mark.parametrize("file", documents(), ids=name_of)
def test_python_in_documents_parses_and_names_what_there_is(file: Path) -> None:
    for block in python_blocks(file):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ds_cp"):
                module = __import__(str(node.module), fromlist=["x"])
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_readme_has_six_lines_of_python_to_run() -> None:
    """``tests/launch/test_examples.py`` runs them."""
    [block] = python_blocks(ROOT / "README.md")
    assert len(block.splitlines()) == 6
    assert "init_inference" in block


def test_the_first_screen_says_what_it_is_and_how_to_start() -> None:
    screen = "\n".join((ROOT / "README.md").read_text("utf-8").splitlines()[:50])
    for word in ("make serve", "make test", "curl ", "init_inference", "vLLM", "SGLang"):
        assert word in screen, word
