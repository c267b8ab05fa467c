"""The tiny model, its configs, and jobs that end with their test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import Job
from tests.helpers.tiny import greedy_tokens, make_tiny_model

Start = Callable[..., Job]
Write = Callable[..., str]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def expected(tiny: Path) -> list[list[int]]:
    """Greedy tokens of transformers alone for ``PROMPTS``."""
    return greedy_tokens(tiny)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a job; it is ended, with all its processes, when the test is over."""
    jobs: list[Job] = []

    def begin(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Job:
        jobs.append(Job(argv, tmp_path, env))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Write:
    """Write a config for the tiny model; keyword arguments replace its sections."""

    def write(**sections: Any) -> str:
        whole = {
            "model": str(tiny),
            "dtype": "fp32",
            "kv_cache": {"tokens_per_rank": 64, "block_size": 16},
            "server": {"port": 0, "served_model_name": "tiny"},
        }
        file = tmp_path / "config.json"
        file.write_text(json.dumps(whole | sections))
        return str(file)

    return write
