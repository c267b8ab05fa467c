"""A fake engine, for tests of what runs over one without a server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fake_engine import FakeEngine, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def engine(tokenizer: Any) -> FakeEngine:
    return FakeEngine(tokenizer)
