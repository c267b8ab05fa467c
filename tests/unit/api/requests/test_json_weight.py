"""What a JSON text costs is counted from its bytes alone, whatever they spell."""

from __future__ import annotations

import json

import pytest

from ds_cp.api.requests.json_weight import MAX_DIGITS, MAX_MEMBERS, MAX_VALUES, too_heavy

# Texts whose quotes, backslashes, brackets and commas are no part of the JSON around them.
DECOYS = [
    "",
    "a",
    '"',
    "\\",
    '\\"',
    "\\\\",
    '"' * 3 + "\\" * 3,
    "[,{,1.5e3",
    "é\ud83d\ude00\n",
    "/",
]


def listed(item: str, count: int) -> bytes:
    return ("[" + ",".join([item] * count) + "]").encode()


@pytest.mark.parametrize("decoy", DECOYS)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_strings_are_counted_whatever_is_in_them(decoy: str, ascii_only: bool) -> None:
    decoy = decoy.encode("utf-16", "surrogatepass").decode("utf-16")
    text = json.dumps(decoy, ensure_ascii=ascii_only)
    assert too_heavy(listed(text, MAX_MEMBERS - 1), 0) is None
    assert f"{MAX_MEMBERS + 1} strings" in str(too_heavy(listed(text, MAX_MEMBERS), 0))


@pytest.mark.parametrize(
    ("item", "members"),
    [("[]", 1), ("{}", 1), ("1.5", 1), ("1e5", 1), ("1E5", 1), ("true", 1), ("false", 1),
     ("-1.5e-7", 2), ('{"a":[]}', 3), ('["[",{}]', 3)],
)  # fmt: skip
def test_members_are_counted(item: str, members: int) -> None:
    fits = (MAX_MEMBERS - 1) // members
    assert too_heavy(listed(item, fits), 0) is None
    reason = too_heavy(listed(item, fits + 1), 0)
    assert reason is not None and reason.startswith("too much to read: it has ")


@pytest.mark.parametrize("item", ["1", "null", "-12"])
def test_values_are_counted(item: str) -> None:
    assert too_heavy(listed(item, MAX_VALUES), 0) is None
    assert f"{MAX_VALUES + 1} values" in str(too_heavy(listed(item, MAX_VALUES + 2), 0))
    assert too_heavy(listed(item, MAX_VALUES + 2), MAX_VALUES + 1) is None  # a longer model


def test_commas_and_brackets_in_a_text_cost_nothing() -> None:
    assert too_heavy(json.dumps({"prompt": 'x, [{"' * 2**20}).encode(), 0) is None


def test_digits_are_bounded() -> None:
    assert too_heavy(b"[" + b"7" * MAX_DIGITS + b"]", 0) is None
    for number in (b"7" * (MAX_DIGITS + 1), b"0." + b"1" * 5000, b"-" + b"90" * 2**20):
        assert f"more than {MAX_DIGITS} digits" in str(too_heavy(b"[" + number + b"]", 0))
    assert too_heavy(b'"' + b"7" * 2**20 + b'"', 0) is None


@pytest.mark.parametrize(
    "text", [b'"', b"\\", b'\\"' * 10, b'"\\', b'["a', b'{"a\\"', b"\xff", b""]
)
def test_what_is_not_json_has_a_weight_too(text: bytes) -> None:
    assert too_heavy(text, 0) is None
