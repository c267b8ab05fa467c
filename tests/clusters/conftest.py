"""Two hosts for a file of tests, and the tiny model that their jobs serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import Job
from tests.helpers.netns import NamespaceError
from tests.helpers.streams import Stream
from tests.helpers.tiny import LONG
from tests.helpers.two_hosts import HostPair, host_pair
from tests.launch.conftest import config, expected, start, tiny

__all__ = ["config", "expected", "pair", "start", "tiny"]

HOW = "as root: make clusters"
# So that LONG and its answer need all four ranks, or both of two.
KV = {"tokens_per_rank": 160, "block_size": 16, "placement": "round_robin"}
KV_OF_TWO = KV | {"tokens_per_rank": 304}
GREEDY: dict[str, Any] = {"prompt": LONG, "max_tokens": 300, "temperature": 0}


@pytest.fixture(scope="module")
def pair() -> Iterator[HostPair]:
    """Two hosts; what a test leaves on them ends with the module."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(host_pair())
        except NamespaceError as err:
            pytest.skip(f"two hosts cannot be made here: {err}; {HOW}")
        yield found


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the output of jobs."""
    return tmp_path_factory.mktemp("job")


def port_of(job: Job) -> int:
    """The port of the server, once it is ready."""
    return int(job.ready().rpartition(":")[2].strip("/"))


def begun(job: Job, stream: Stream, events: int = 5) -> Stream:
    """Wait until the stream has brought some tokens."""
    job.until("tokens", lambda: stream.count >= events or stream.errors, 60)
    assert not stream.errors and not stream.is_over, (stream.errors, job.story())
    return stream
