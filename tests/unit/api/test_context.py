"""The salt that keeps the cached prefixes of API keys and requests apart."""

from __future__ import annotations

from ds_cp.api.context import engine_salt


def test_engine_salt_keeps_its_parts_apart() -> None:
    salts = [
        engine_salt(key, salt)
        for key in (None, "", "a", "ab", 'a", "b')
        for salt in ("", "b", "ab", '", "b')
    ]
    assert salts[0] == "" and len(set(salts)) == len(salts)
