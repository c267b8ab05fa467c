"""A fake engine, for tests of what runs over one without a server."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.fake_engine import FakeEngine, make_tokenizer

# Two processes run these tests on two cores. Threads of one that wait, spinning, for each other
# while the other has the core would take four times the CPU.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def engine(tokenizer: Any) -> FakeEngine:
    return FakeEngine(tokenizer)
