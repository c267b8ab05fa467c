"""The native library for tests: a skip with its reason where there is none."""

from __future__ import annotations

import pytest

from ds_cp.native import Library, load


def native_library() -> Library:
    """The built library; skips the test when there is none."""
    found = load()
    if not isinstance(found, Library):
        pytest.skip(found)
    return found
