"""The lines of a batch file: requests, and what is wrong with the others."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from ds_cp.batch.format import BatchRequest, Problem, read_requests
from tests.helpers.batches import LIMIT, TEXT, line, parsed, requests_of


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        ("{", "invalid_json", "not valid JSON at column 2"),
        (b'{"custom_id": "\xff"}', "invalid_json", "not UTF-8 text: wrong byte at 15"),
        (b"\0\0", "invalid_json", "not valid JSON"),
        ('{"custom_id": "x", "body": {"temperature": NaN}}', "invalid_json", "NaN is not a JSON"),
        ('{"custom_id": "x", "custom_id": "y"}', "invalid_json", "given twice"),
        ("[" * 100_000, "line_too_long", f"100000 bytes; at most {LIMIT} are read"),
        ("[" * LIMIT, "invalid_json", "nested too deeply"),
        (
            '["a"]',
            "not_an_object",
            'not an object {"custom_id", "method", "url", "body"} but ["a"]',
        ),
        ("7", "not_an_object", "but 7"),
        (
            line("x").replace("method", "metod"),
            "unknown_field",
            '"metod"; a line has custom_id, me',
        ),
        ('{"method": "POST", "url": "u", "body": {}}', "missing_custom_id", "custom_id is missing"),
        ('{"custom_id": "x", "url": "u", "body": {}}', "missing_method", "method is missing"),
        ('{"custom_id": "x", "method": "POST", "body": {}}', "missing_url", "url is missing"),
        ('{"custom_id": "x", "method": "POST", "url": "u"}', "missing_body", "body is missing"),
        (line(7), "invalid_custom_id", "a string of 1 to 512 characters, not 7"),
        (line(""), "invalid_custom_id", 'not ""'),
        (line("x" * 513), "invalid_custom_id", "512"),
        (line("x").replace("POST", "GET"), "invalid_method", 'method must be POST, not "GET"'),
        (line("x").replace(TEXT, "/v1/embeddings"), "invalid_url", 'not "/v1/embeddings"'),
        (line("x").replace(f'"{TEXT}"', "[1]"), "invalid_url", "not [1]"),
        (
            json.dumps({"custom_id": "x", "method": "POST", "url": TEXT, "body": []}),
            "invalid_body",
            "must be an object",
        ),
        (line("x", stream=True), "stream_not_supported", "leave stream out"),
        (line("x", stream="yes"), "stream_not_supported", "leave stream out"),
        (line("first"), "duplicate_custom_id", 'custom_id "first" is that of line 1 already'),
    ],
)
def test_a_broken_line_is_reported_and_the_rest_is_read(
    text: str | bytes, code: str, part: str
) -> None:
    first, problem, last = parsed(line("first"), text, line("last", stream=False))
    assert isinstance(first, BatchRequest) and isinstance(last, BatchRequest)
    assert isinstance(problem, Problem)
    assert (problem.line, problem.code) == (2, code) and part in problem.message
    assert "\n" not in problem.message and len(problem.message) < 400
    assert (first.line, last.line, last.custom_id) == (1, 3, "last")


def test_a_problem_has_the_id_where_it_is_known() -> None:
    problems = parsed(line("x", stream=True), line(7), line("y"), line("y"), "{")
    ids = [item.custom_id for item in problems]
    assert ids == ["x", None, "y", "y", None]


def test_an_id_of_a_broken_line_is_free() -> None:
    broken, good = parsed(line("x", stream=True), line("x"))
    assert isinstance(broken, Problem) and isinstance(good, BatchRequest)


def test_line_ends_and_empty_lines() -> None:
    data = "\ufeff" + line("a") + "\r\n\n  \r\n" + line("b\u2028c")  # no line end at the end
    found = list(read_requests(io.BytesIO(data.encode()), LIMIT))
    assert [(item.line, item.custom_id) for item in found] == [(1, "a"), (4, "b\u2028c")]


def test_limit_is_of_the_line_without_its_end() -> None:
    text = line("a")
    assert isinstance(parsed(text, text, limit=len(text))[0], BatchRequest)
    problem, other = parsed(text, "{}", limit=len(text) - 1)
    assert isinstance(problem, Problem) and f"has {len(text)} bytes" in problem.message
    assert other.line == 2


def test_a_huge_line_is_never_held_whole() -> None:
    class Spy(io.BytesIO):
        largest = 0

        def readline(self, size: Any = -1) -> bytes:
            part = super().readline(size)
            self.largest = max(self.largest, len(part))
            return part

    file = Spy(b"x" * (8 << 20) + b"\n" + line("a").encode())
    problem, good = read_requests(file, LIMIT)
    assert isinstance(problem, Problem) and f"has {8 << 20} bytes" in problem.message
    assert good.custom_id == "a" and file.largest <= 1 << 20


def test_body_is_sent_in_utf8() -> None:
    (request,) = requests_of(line("a", prompt="日本" * 9))
    assert json.loads(request.body)["prompt"] == "日本" * 9
    assert len(request.body) < len(line("a", prompt="日本" * 9).encode()) / 2
