"""``ds-cp completion``: completion for bash, zsh and fish, made from the parsers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial

from ds_cp.cli.output import put
from ds_cp.cli.parser import Parser, Verbs, add_json, walk

SHELLS = ("bash", "zsh", "fish")
FILES = ("FILE", "PATH", "IN", "OUT")  # what the value of an argument is called when it is a file


def add_completion(verbs: Verbs, whole: Callable[[], Parser]) -> None:
    """Add ``completion`` to the verbs of ``ds-cp``, for the parser that ``whole`` makes."""
    parser = verbs.add_parser(
        "completion",
        help="a script that completes this command in a shell",
        description='Prints a script. bash: eval "$(ds-cp completion bash)" in ~/.bashrc. zsh: '
        "ds-cp completion zsh > _ds-cp, in a folder of $fpath. fish: ds-cp completion fish > "
        "~/.config/fish/completions/ds-cp.fish",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    add_json(parser, "the script in an object")
    parser.set_defaults(verb=partial(_completion, whole))


def _completion(
    whole: Callable[[], Parser], args: argparse.Namespace, env: Mapping[str, str]
) -> int:
    script = completion(whole(), args.shell)
    put(json.dumps({"shell": args.shell, "script": script}) if args.json else script.rstrip("\n"))
    return 0


def completion(parser: Parser, shell: str) -> str:
    """The script for one of ``SHELLS``. ``parser`` is of no other use afterwards."""
    import shtab

    for _, one in walk(parser):
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                for listed in action._choices_actions:  # the short text, as in the help
                    action.choices[listed.dest].description = listed.help
            if action.metavar in FILES and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script
