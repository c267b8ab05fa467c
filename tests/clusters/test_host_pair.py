"""The two hosts themselves: what may happen to them happens."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.jobs import Job
from tests.helpers.two_hosts import HostPair

pytestmark = pytest.mark.netns

# Prints whether the other host answers within a second.
ASK = """
import socket
try:
    socket.create_connection(("nodeb", 8000), 1).close()
    print("answers")
except OSError as err:
    print(type(err).__name__)
"""


def serve(pair: HostPair, host: str, folder: Path) -> Job:
    listen = [sys.executable, "-u", "-m", "http.server", "8000", "--bind", "0.0.0.0"]
    job = pair.start(host, listen, folder)
    job.until("a server", lambda: "Serving HTTP" in job.out, 30)
    return job


def asked(pair: HostPair) -> str:
    return pair.hosts.run("nodea", [sys.executable, "-c", ASK]).stdout.strip()


def test_a_network_that_is_cut_and_hosts_that_are_lost(pair: HostPair, folder: Path) -> None:
    jobs = [serve(pair, host, folder) for host in pair.hosts.names]
    assert [len(pair.processes(host)) for host in pair.hosts.names] == [1, 1]
    with pair.door("nodea", 8000) as url:
        assert urllib.request.urlopen(url, timeout=20).status == 200
    assert asked(pair) == "answers"
    with pair.partition():
        assert asked(pair) == "TimeoutError"
    with pair.slow_link(1):
        assert asked(pair) == "answers"

    with pair.restored("nodeb"):
        pair.kill_host("nodeb")
        pair.until_empty(10, "nodeb")
        assert len(pair.processes("nodea")) == 1
        assert asked(pair) == "TimeoutError"  # as of a host without power
    assert asked(pair) == "ConnectionRefusedError"
    pair.kill_host("nodea", silent=False)
    pair.until_empty(10)
    for job in jobs:
        job.close()
