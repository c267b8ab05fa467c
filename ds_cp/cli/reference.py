"""docs/cli.md, made from the parsers: ``python -m ds_cp.cli.reference > docs/cli.md``."""

from __future__ import annotations

import argparse

from ds_cp.cli.main import build_parser
from ds_cp.cli.parser import Parser, flags, takes_several, twin_of, walk

HEAD = """\
# The command line

Made from the parsers by `python -m ds_cp.cli.reference > docs/cli.md`.

- **Flags and the environment.** Each flag has a twin in the environment, named after the command and the flag: `ds-cp bench comm --out` is `DS_CP_BENCH_COMM_OUT`.
  A flag wins. An empty variable counts as not set. A switch takes 1, true, yes, on or 0, false, no, off; a flag that may be repeated, or takes several values, takes
  words as a shell splits them. Of flags that exclude each other, one that is given puts the twins of the others aside.
- **`--json`.** Every command has it. stdout then holds JSON and nothing else, one object a line, in ASCII. What people read (progress, notes, the one line of a
  failure) is on stderr, and the exit code says how it ended.
  An object holds: `serve` ready, urls, summary; `generate` the fields of `RequestOutput`; `batch` the counts of its summary; `chat` role, content,
  reasoning_content, finish_reason, stopped, prompt_tokens, cached_tokens, completion_tokens, ttft_s, seconds; `top` what GET /state says; `plan` the report;
  `doctor` ds_cp, ok, checks; `config check` file, ok, and `explain` config as well; `config schema` the schema; `version` versions by package; `completion` shell,
  script; `bench comm` the device file.
- **Exit codes.** 0 done; 2 the user's input, with one line on stderr that says what is wrong and the way out; 1 a failure of ours or of the server; 130 Ctrl-C.
- **Terminal.** What comes from a server is shown as text: control characters in it are made visible, never sent to the terminal.
- **Figures.** Every `ds-cp bench` but `comm`, which writes a device file, has one shape: `bench`, `ds_cp`, `date` (UTC), `machine` (before the load), `settings`
  (what was asked for, with the warm-up), `about` (what was found), `figures` (a list of `name`, `unit`, `count`, `min`, `median`, `p90`, `p99`, `max`) and `notes`.
- **Completion.** `eval "$(ds-cp completion bash)"`; zsh and fish: `ds-cp completion --help`.
"""  # noqa: E501


def reference(parser: Parser) -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for path, one in walk(parser):
        if path and not _subparsers(one):
            parts.append(_command(path, one))
    return "\n".join(parts)


def _command(path: tuple[str, ...], parser: Parser) -> str:
    positional = [a for a in parser._actions if not a.option_strings]
    words = " ".join([
        "ds-cp", *path, *(_positional(action) for action in positional),
        *(_needed(action) for action in flags(parser) if action.required),
        *([] if all(action.required for action in flags(parser)) else ["[flags]"]),
    ])  # fmt: skip
    lines = [f"## `{words}`", "", _text(parser.description or _summary(path)), ""]
    lines += ["| | | environment |", "| --- | --- | --- |"]
    for action in positional:
        lines.append(f"| `{_name(action)}` | {_text(action.help)} | |")
    for action in flags(parser):
        help_ = _text(action.help) + ("; may be repeated" if _repeats(action) else "")
        lines.append(f"| `{_needed(action)}` | {help_} | `{twin_of(parser.prog, action)}` |")
    if parser.epilog:
        lines += ["", _text(parser.epilog)]
    return "\n".join([*lines, ""])


def _summary(path: tuple[str, ...]) -> str:
    """What the list of verbs says of a command."""
    parser: argparse.ArgumentParser = build_parser()
    text = ""
    for name in path:
        action = _subparsers(parser)
        assert action is not None
        text = next(str(a.help) for a in action._choices_actions if a.dest == name)
        parser = action.choices[name]
    return text[:1].upper() + text[1:] + "."


def _subparsers(
    parser: argparse.ArgumentParser,
) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
    found = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return next(found, None)


def _repeats(action: argparse.Action) -> bool:
    return takes_several(action) and action.nargs is None


def _name(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


def _positional(action: argparse.Action) -> str:
    name = _name(action)
    return {"?": f"[{name}]", "+": f"{name}...", "*": f"[{name}...]"}.get(str(action.nargs), name)


def _needed(action: argparse.Action) -> str:
    """A flag with its value."""
    flag = next(name for name in action.option_strings if name.startswith("--"))
    if action.nargs == 0:
        return flag
    return f"{flag} {_name(action)}" + ("..." if action.nargs == "+" else "")


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("~", "\\~")


if __name__ == "__main__":
    print(reference(build_parser()), end="")
