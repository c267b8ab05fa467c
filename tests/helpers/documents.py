"""The code of the documents: every block, and every command in it.

What a reader may copy is a block in a fence with its language (``sh``, ``python``, ``json``,
``yaml``, ``text``), or an indented one, whose language follows from its first line. A ``python``
block whose first line is ``# NAME.py`` is a file of that name, which later commands start.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
SERVER = "http://127.0.0.1:8000"  # where documents find a server
LANGUAGES = ("sh", "python", "json", "yaml", "ini", "text")
# A line that begins with one of them is a command.
PROGRAMS = (
    "curl deepspeed docker ds-cp git kubectl make mpirun pip pytest python python3 sbatch scancel "
    "scontrol sed ssh srun torchrun"
).split()
_COMMAND = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})(?: |$)")
_VARIABLE = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A block of code. ``line``: of its first line in ``file``, from 1."""

    file: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """For a message: ``docs/guides/cluster.md:12``."""
        return f"{name_of(self.file)}:{self.line}"

    @property
    def script(self) -> str | None:
        """The name of the file that this block is, None for any other block."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found and self.language == "python" else None


@dataclass(frozen=True)
class Command:
    """One command of a block, its continued lines joined. ``words``: as the shell splits them,
    without leading assignments, up to a pipe, a redirection or ``&``."""

    block: Block
    text: str

    @property
    def words(self) -> list[str]:
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars="|><;&")
        lexer.whitespace_split = True
        words = list(lexer)
        ends = [i for i, word in enumerate(words) if word[0] in "|><;&"]
        words = words[: ends[0]] if ends else words
        while words and _VARIABLE.match(words[0]):
            words.pop(0)
        return words

    @property
    def program(self) -> str:
        """The first word, of the virtual environment or not."""
        return self.words[0].removeprefix(".venv/bin/")

    def __str__(self) -> str:
        return f"{self.block.place}: {self.text}"


def name_of(file: Path) -> str:
    """The path in the repository."""
    return file.relative_to(ROOT).as_posix()


def guides() -> list[Path]:
    """The documents whose code is run or checked: the README, docs/ and examples/."""
    found = [*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    return sorted([*found, ROOT / "CONTRIBUTING.md"])


def is_made(file: Path) -> bool:
    """Whether a page is made from the code, whose own tests compare the two."""
    head = "\n".join(file.read_text("utf-8").splitlines()[:5])
    return bool(re.search(r"^(Made|Written) from ", head, re.MULTILINE))


@cache
def blocks_of(file: Path) -> tuple[Block, ...]:
    """Every block of code of a document, in order."""
    found = []
    for token in MarkdownIt("commonmark").parse(file.read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            fenced = token.type == "fence"
            language = token.info.strip() if fenced else _guess(token.content)
            found.append(Block(file, token.map[0] + 1 + fenced, language, token.content))
    return tuple(found)


def all_blocks(language: str = "") -> list[Block]:
    """The blocks of all guides, of one language or of all."""
    blocks = [block for file in guides() for block in blocks_of(file)]
    return [block for block in blocks if language in ("", block.language)]


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a block of language ``sh``."""
    text = ""
    for line in block.text.splitlines():
        text += line.strip()
        if text.endswith("\\"):
            text = text[:-1]
            continue
        without = _without_comment(text)
        if without:
            yield Command(block, without)
        text = ""
    assert not text, f"{block.place} ends with a backslash"


def all_commands() -> list[Command]:
    """Every command of every guide."""
    return [command for block in all_blocks("sh") for command in commands_of(block)]


def inline_commands(program: str) -> Iterator[tuple[str, str]]:
    """Commands of one program within sentences: where, and what stands between the backticks."""
    for file in guides():
        for token in MarkdownIt("commonmark").enable("table").parse(file.read_text("utf-8")):
            for child in token.children or ():
                if child.type == "code_inline" and child.content.startswith(f"{program} "):
                    yield name_of(file), child.content


def looks_like_command(line: str) -> bool:
    """Whether a line of a block begins with a program that documents start."""
    return bool(_COMMAND.match(line.strip()))


def _guess(text: str) -> str:
    first = text.lstrip().splitlines()[0]
    if re.match(r"(import|from) \w|# \w+\.py$", first):
        return "python"
    if first.startswith("{"):
        return "json"
    return "sh" if looks_like_command(first) else "text"


def _without_comment(text: str) -> str:
    """A line without the comment at its end; a ``#`` in quotes stays."""
    quote = ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "#" and (i == 0 or text[i - 1].isspace()):
            return text[:i].strip()
    return text.strip()
