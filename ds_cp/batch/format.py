"""OpenAI's batch format: reads one request from each line, or the problem of the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from ds_cp.text import parse_json, show

# What a line may ask for, and its fields.
URLS = ("/v1/chat/completions", "/v1/completions")
KEYS = ("custom_id", "method", "url", "body")
MAX_ID_CHARS = 512  # characters of a custom_id


@dataclass(frozen=True)
class BatchRequest:
    """A valid line. ``body`` is JSON, which only the server checks."""

    line: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True)
class Problem:
    """A line that is not a request, or a request that the server refused, and the reason."""

    line: int
    custom_id: str | None
    code: str
    message: str


def read_requests(file: BinaryIO, max_line_bytes: int) -> Iterator[BatchRequest | Problem]:
    """The lines of a batch file, read one by one as the caller asks; empty ones are left out.

    Of two requests with one ``custom_id`` the second is a ``Problem``. A line of more than
    ``max_line_bytes`` is never in memory as a whole.
    """
    lines_of: dict[str, int] = {}
    number = 0
    while raw := file.readline(max_line_bytes + 1):
        number += 1
        if len(raw) > max_line_bytes and not raw.endswith(b"\n"):
            size = len(raw) + _rest_of_line(file)
            message = f"the line has {size} bytes; at most {max_line_bytes} are read"
            yield Problem(number, None, "line_too_long", message)
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        raw = raw.strip()
        if not raw:
            continue
        item = parse_line(number, raw)
        if isinstance(item, BatchRequest):
            first = lines_of.setdefault(item.custom_id, number)
            if first != number:
                name = show(item.custom_id)
                item = Problem(
                    number,
                    item.custom_id,
                    "duplicate_custom_id",
                    f"custom_id {name} is that of line {first} already; give each line its own",
                )
        yield item


def parse_line(line: int, raw: bytes) -> BatchRequest | Problem:
    """One line, checked up to its body."""
    try:
        value = parse_json(raw.decode())
    except UnicodeDecodeError as err:
        return Problem(line, None, "invalid_json", f"not UTF-8 text: wrong byte at {err.start}")
    except ValueError as err:
        message = str(err).replace("at line 1, column", "at column")
        return Problem(line, None, "invalid_json", message)
    if not isinstance(value, dict):
        form = '{"custom_id", "method", "url", "body"}'
        return Problem(line, None, "not_an_object", f"not an object {form} but {show(value)}")
    name = value.get("custom_id")
    known = name if isinstance(name, str) and 1 <= len(name) <= MAX_ID_CHARS else None
    wrong = _envelope_problem(value, known)
    if wrong is not None:
        return Problem(line, known, *wrong)
    assert known is not None
    try:
        return BatchRequest(line, known, value["url"], _encode(value["body"]))
    except RecursionError:
        return Problem(line, known, "invalid_json", "not usable JSON: nested too deeply")


def _envelope_problem(value: dict[str, Any], custom_id: str | None) -> tuple[str, str] | None:
    """Code and message of the first fault in the fields of a line, or None. Of the body it checks
    only that the answer is not a stream."""
    for key in value:
        if key not in KEYS:
            return "unknown_field", f"unknown field {show(key)}; a line has {', '.join(KEYS)}"
    for key in KEYS:
        if key not in value:
            return f"missing_{key}", f"{key} is missing; a line has {', '.join(KEYS)}"
    if custom_id is None:
        return "invalid_custom_id", (
            f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters, "
            f"not {show(value['custom_id'])}"
        )
    if value["method"] != "POST":
        return "invalid_method", f"method must be POST, not {show(value['method'])}"
    if value["url"] not in URLS:
        return "invalid_url", f"url must be {' or '.join(URLS)}, not {show(value['url'])}"
    body = value["body"]
    if not isinstance(body, dict):
        return "invalid_body", f"body must be an object with the request's fields, not {show(body)}"
    if body.get("stream") not in (None, False):
        return "stream_not_supported", "a batch answers whole: leave stream out of the body"
    return None


def _encode(body: dict[str, Any]) -> bytes:
    """A body in UTF-8, as a client would send it: the server's limit counts these bytes."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair: the server refuses it with its own message
        return json.dumps(body, separators=(",", ":")).encode()


def _rest_of_line(file: BinaryIO) -> int:
    size = 0
    while part := file.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            return size - 1
    return size
