"""Prompts and sampling parameters from the command line and from files."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_cp.errors import RequestError
from ds_cp.sampling_params import SamplingParams
from ds_cp.text import nearest, parse_json, shorten, show

MAX_FILE_BYTES = 1 << 28  # bytes of a file of prompts
MAX_TOKEN_ID = 2**31 - 1  # largest id that a prompt may name
# Fields of a line besides prompt.
FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True)
class Prompts:
    """Prompts (text, or token ids) and the parameters of each."""

    texts: tuple[str | list[int], ...] = ()
    params: tuple[SamplingParams, ...] = ()


def read_prompts(args: argparse.Namespace) -> Prompts:
    """What ``ds-cp generate`` was given. ``RequestError`` names the file, line and field."""
    given = {name: getattr(args, name, None) for name in FIELDS}
    defaults = {name: value for name, value in given.items() if value is not None}
    params = SamplingParams(**defaults)
    if args.prompts_file is not None:
        return _read_lines(args.prompts_file, defaults)
    if args.prompt_file is not None:
        text, where = read_text(args.prompt_file), f"prompt file {args.prompt_file}"
    else:
        text, where = args.prompt, "--prompt"
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError("--prompt is not UTF-8 text", "prompt")
    if not text:
        raise RequestError(f"{where} is empty; give at least one character", "prompt")
    return Prompts((text,), (params,))


def read_text(file: str) -> str:
    """A whole UTF-8 text file. ``RequestError`` when it is not that, or too large."""
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise RequestError(
            f"cannot read prompt file {file}: {err.strerror or err}", "prompt"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(f"prompt file {file} is larger than {MAX_FILE_BYTES} bytes", "prompt")
    if b"\0" in data:
        raise RequestError(
            f"prompt file {file} is not text: byte {data.index(0)} is zero", "prompt"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise RequestError(
            f"prompt file {file} is not UTF-8 text: wrong byte at {err.start}", "prompt"
        ) from None


def _read_lines(file: str, defaults: dict[str, Any]) -> Prompts:
    texts: list[str | list[int]] = []
    params: list[SamplingParams] = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt, fields = _parse_line(line)
            texts.append(prompt)
            params.append(SamplingParams(**(defaults | fields)))
        except RequestError as err:
            raise RequestError(f"{file} line {number}: {err}", err.param) from None
    if not texts:
        raise RequestError(f"prompts file {file} holds no prompt", "prompt")
    return Prompts(tuple(texts), tuple(params))


def _parse_line(line: str) -> tuple[str | list[int], dict[str, Any]]:
    try:
        value = parse_json(line)
    except ValueError as err:
        raise RequestError(str(err).replace("at line 1, column", "at column"), "prompt") from None
    fields: dict[str, Any] = {}
    if isinstance(value, dict):
        fields = {_known(name): value[name] for name in value if name != "prompt"}
        if "prompt" not in value:
            raise RequestError("the object has no prompt", "prompt")
        value = value["prompt"]
    if not isinstance(value, str) and not _is_ids(value):
        raise RequestError(
            f"a prompt must be a string or a list of token ids, not {show(value)}", "prompt"
        )
    if not value:
        raise RequestError("the prompt is empty", "prompt")
    return value, fields


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_TOKEN_ID
        for item in value
    )


def _known(name: str) -> str:
    """The name of a sampling field; ``SamplingParams`` checks and converts its value."""
    if name not in FIELDS:
        raise RequestError(
            f"unknown field {shorten(name)}; the nearest valid one is "
            + nearest(name, FIELDS, FIELDS),
            shorten(name),
        )
    return name
