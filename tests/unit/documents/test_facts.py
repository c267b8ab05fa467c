"""What the documents say of the product is so: codes of errors, messages, metrics, settings."""

from __future__ import annotations

import ast
import re
from functools import cache

from prometheus_client.parser import text_string_to_metric_families

from ds_cp.api.metrics import ServerMetrics
from ds_cp.config import Config
from tests.helpers.documents import ROOT, guides, is_made, name_of
from tests.helpers.fake_engine import FakeEngine, make_tokenizer

OPERATING = ROOT / "docs/guides/operating.md"
TEMPLATES = ("chat_template_error", "chat_template_refused", "chat_template_too_slow",
             "no_chat_template")  # fmt: skip


@cache
def trees() -> list[ast.Module]:
    return [ast.parse(file.read_text("utf-8")) for file in sorted(ROOT.glob("ds_cp/**/*.py"))]


def codes() -> set[str]:
    """The ``code`` of every error that the HTTP application makes."""
    found = set(TEMPLATES)
    for file in ROOT.glob("ds_cp/api/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            if getattr(node.func, "id", "") == "try_again":
                given += node.args[1:]
            found |= {str(v.value) for v in given if isinstance(v, ast.Constant)}
            if getattr(node.func, "id", "") == "context_overflow":
                found.add("context_length_exceeded")
    return found


def test_every_error_has_its_way_out() -> None:
    """In a row of the table that names the code."""
    table = "\n".join(line for line in OPERATING.read_text("utf-8").splitlines()
                      if line.startswith("| `"))  # fmt: skip
    assert sorted(code for code in codes() if f"`{code}`" not in table) == []


def test_messages_in_the_documents_are_ours() -> None:
    """First columns of tables headed "message" or "line on stderr"; ``...`` and numbers stand for
    anything."""
    texts = {n.value for tree in trees() for n in ast.walk(tree)
             if isinstance(n, ast.Constant) and isinstance(n.value, str)}  # fmt: skip
    everything = "\0".join(texts)
    checked, wrong = 0, []
    for file in guides():
        in_table = False
        for line in file.read_text("utf-8").splitlines():
            if line.startswith(("| message |", "| line on stderr |")):
                in_table = True
            elif not line.startswith("|"):
                in_table = False
            elif in_table and (found := re.match(r"\| `([^`]+)`", line)):
                for part in re.split(r"\.\.\.|\[.*?\]|\d+(?:\.\d+)?|SIGKILL", found[1]):
                    checked += len(part.split()) > 1
                    if len(part.split()) > 1 and part.strip() not in everything:
                        wrong.append(f"{name_of(file)}: {part}")
    assert wrong == [] and checked > 15


def test_settings_in_the_documents_exist() -> None:
    """``section.key`` between backticks."""
    sections = {name: set(type(value).model_fields) for name, value in Config(model="m")
                if hasattr(type(value), "model_fields")}  # fmt: skip
    pattern = re.compile(rf"`({'|'.join(sections)})\.([a-z_]+)")
    wrong = [
        f"{name_of(file)}: {section}.{key}"
        for file in guides()
        if not is_made(file)
        for section, key in pattern.findall(file.read_text("utf-8"))
        if key not in sections[section]
    ]
    assert wrong == []


def test_metrics_in_the_documents_exist() -> None:
    text, _ = ServerMetrics(FakeEngine(make_tokenizer()), lambda: "m").exposition("")
    there = set()
    for family in text_string_to_metric_families(text.decode()):
        there |= {family.name, f"{family.name}_total"}
    named = {name for file in guides() if not is_made(file)
             for name in re.findall(r"`(ds_cp:\w+)`", file.read_text("utf-8"))}  # fmt: skip
    assert named and sorted(named - there) == []
