"""What the documents promise is there: files, links, pictures."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.documents import ROOT, name_of

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


def links_of(file: Path) -> list[Path]:
    """Where the links of a document lead within the repository."""
    found = [link for link in LINK.findall(file.read_text("utf-8")) if "://" not in link]
    return [(file.parent / link).resolve() for link in found]


@pytest.mark.parametrize("file", documents(), ids=name_of)
def test_links_and_paths_lead_somewhere(file: Path) -> None:
    text = file.read_text("utf-8")
    missing = [str(link) for link in links_of(file) if not link.exists()]
    if file.name != "CHANGELOG.md":  # it speaks of the past
        missing += [path for path in PATH.findall(text) if not list(ROOT.glob(path))]
        rooms = [(ROOT / "ds_cp" / path, ROOT / path) for path in ROOM.findall(text)]
        missing += [str(a) for a, b in rooms if not a.exists() and not b.exists()]
    assert missing == []


def test_the_readme_leads_to_every_page() -> None:
    """By links, or by those of the pages that it links to. A folder leads to the pages in it."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        file = todo.pop()
        if file.is_dir():
            reached.update(file.glob("*.md"))
        elif file.suffix == ".md" and file not in reached:
            reached.add(file)
            todo += links_of(file)
    assert [name_of(page) for page in ROOT.glob("docs/**/*.md") if page not in reached] == []


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


def test_the_first_screen_says_what_it_is_and_how_to_start() -> None:
    screen = "\n".join((ROOT / "README.md").read_text("utf-8").splitlines()[:50])
    for word in ("make serve", "make test", "curl ", "init_inference", "vLLM", "SGLang"):
        assert word in screen, word
