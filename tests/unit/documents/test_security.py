"""SECURITY.md's table of what others learned: each row has tests, and they exist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.helpers.documents import ROOT

HEAD = "| of others | what they had | ds_cp | tests |"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
ADVISORY = re.compile(r"CVE-20\d\d-\d{4,5}|GHSA(?:-[0-9a-z]{4}){3}")
# What is known of other servers of this kind; a new one comes with its row.
KNOWN = """
CVE-2024-43497 CVE-2024-50050 CVE-2025-10164 CVE-2025-23310 CVE-2025-23311 CVE-2025-23319
CVE-2025-23320 CVE-2025-23334 CVE-2025-29770 CVE-2025-30165 CVE-2025-30202 CVE-2025-32434
CVE-2025-32444 CVE-2025-33201 CVE-2025-47277 CVE-2025-48944 CVE-2025-48956 CVE-2025-59425
CVE-2025-6242 CVE-2025-62164 CVE-2025-62426 CVE-2026-0599 CVE-2026-21869 CVE-2026-22773
CVE-2026-22778 CVE-2026-22807 CVE-2026-24747 CVE-2026-24779 CVE-2026-26220 CVE-2026-27893
CVE-2026-3059 CVE-2026-3060 CVE-2026-34756 CVE-2026-3989 CVE-2026-44223 CVE-2026-5497
CVE-2026-5760 CVE-2026-7301 CVE-2026-9540 GHSA-7rxv-5jhh-j6xx
""".split()


@cache
def rows() -> list[list[str]]:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    lines = text[text.index(HEAD) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@cache
def names_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {n.name for n in tree.body if isinstance(n, kinds) and n.name.startswith("test_")}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].split(",")[0])
def test_a_lesson_is_held_by_tests(row: list[str]) -> None:
    assert len(row) == 4 and all(row)
    named = TEST.findall(row[3])
    assert named and TEST.sub("", row[3]).replace("<br>", "").strip() == ""
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or name not in names_of(file)
    ]
    assert missing == []


def test_every_known_lesson_has_one_row() -> None:
    found = [name for row in rows() for name in ADVISORY.findall(row[0])]
    assert sorted(found) == sorted(KNOWN)
