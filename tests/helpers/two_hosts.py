"""Two hosts that fail: one is lost, the network between them is cut, or slow.

The hosts are those of ``netns``. What happens to them happens without a word to the other side, as
it does to machines: packets vanish, connections stay open.

    with host_pair() as pair, pair.door("nodea", 8000) as url:
        job = pair.start("nodea", [sys.executable, "launch/serve.py", ...], folder)
        with pair.partition():
            ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.jobs import ROOT, Job, busy
from tests.helpers.netns import Hosts, Relay, outer_pid, two_hosts


@contextmanager
def host_pair(names: tuple[str, str] = ("nodea", "nodeb")) -> Iterator[HostPair]:
    """Two hosts whose faults can be made. ``NamespaceError`` where that is not permitted."""
    with two_hosts(names) as hosts:
        yield HostPair(hosts)


@dataclass(frozen=True)
class HostPair:
    """Two running hosts and what may happen to them."""

    hosts: Hosts

    # --- processes

    def start(
        self, host: str, argv: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
    ) -> Job:
        """Start a command on one host. A signal to ``Job.process`` does not reach it: see
        ``signal``."""
        return Job(self.hosts.command(host, argv, ROOT), folder, env)

    def start_ranks(
        self,
        argv: Sequence[str],
        folder: Path,
        per_host: tuple[int, int] = (2, 2),
        env: Mapping[str, str] | None = None,
    ) -> list[Job]:
        """Start one plain Python for each rank, which no launcher watches or ends; the ranks'
        jobs in order."""
        jobs = []
        for at, (host, ranks) in enumerate(zip(self.hosts.names, per_host, strict=True)):
            for local in range(ranks):
                place = {
                    "RANK": len(jobs),
                    "WORLD_SIZE": sum(per_host),
                    "LOCAL_RANK": local,
                    "LOCAL_WORLD_SIZE": per_host[at],
                    "MASTER_ADDR": self.hosts.addresses[0],
                    "MASTER_PORT": 29500,
                }
                own = {name: str(value) for name, value in place.items()}
                command = [sys.executable, *argv]
                jobs.append(self.start(host, command, folder, dict(env or {}) | own))
        return jobs

    def processes(self, host: str) -> list[psutil.Process]:
        """What runs on one host, whoever started it; not what keeps the host itself up."""
        keeper = outer_pid(self.hosts, host)
        network = _network(keeper)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if process.pid != keeper and alive and _network(process.pid) == network:
                    found.append(process)
        return found

    def matching(self, host: str, text: str) -> list[psutil.Process]:
        """Processes of one host with ``text`` in their command line, the oldest first."""
        found = []
        for process in self.processes(host):
            with contextlib.suppress(psutil.Error):
                if text in " ".join(process.cmdline()):
                    found.append((process.create_time(), process.pid, process))
        return [process for *_, process in sorted(found, key=lambda each: each[:2])]

    def signal(self, host: str, text: str, number: signal.Signals) -> None:
        """Send a signal to the oldest process of one host with ``text`` in its command line."""
        oldest = self.matching(host, text)[0]
        oldest.send_signal(number)

    def until_empty(self, limit_s: float, *hosts: str, but: Sequence[str] = ()) -> None:
        """Wait until nothing runs on these hosts (both, if none is named), apart from what has one
        of ``but`` in its command line. ``AssertionError`` with what is left."""
        end = time.monotonic() + limit_s * busy()
        while left := self._left(hosts or self.hosts.names, but):
            assert time.monotonic() < end, f"still there after {limit_s:g} s:\n" + "\n".join(left)
            time.sleep(0.1)

    def _left(self, hosts: Sequence[str], but: Sequence[str]) -> list[str]:
        found = []
        for host in hosts:
            for process in self.processes(host):
                with contextlib.suppress(psutil.Error):
                    words = " ".join(process.cmdline())
                    if words and not any(word in words for word in but):
                        found.append(f"  {host}: {process.pid} {words[:150]}")
        return found

    def clear(self) -> None:
        """End all that runs on both hosts."""
        for host in self.hosts.names:
            self._kill_all(host)

    def _kill_all(self, host: str) -> None:
        for process in self.processes(host):
            with contextlib.suppress(psutil.Error):
                process.kill()

    # --- faults

    def kill_host(self, host: str, *, silent: bool = True) -> None:
        """End all that runs on a host at once. ``silent``: as when its power fails, so that its
        kernel closes no connection; else as when it is shut down by force."""
        if silent:
            self._shape(host, "pfifo", "limit", "0")
        self._kill_all(host)

    @contextmanager
    def restored(self, host: str) -> Iterator[None]:
        """After the block a lost host is up again, empty."""
        try:
            yield
        finally:
            self._kill_all(host)
            self._shape(host, "pfifo", "limit", "1000")

    @contextmanager
    def partition(self) -> Iterator[None]:
        """No packet passes between the hosts within the block; nothing tells them so."""
        with self._shaped("pfifo", "limit", "0"):
            yield

    def partition_for(self, seconds: float) -> None:
        """Cut the network between the hosts for some seconds."""
        with self.partition():
            time.sleep(seconds)

    @contextmanager
    def slow_link(self, mbit_per_s: float) -> Iterator[None]:
        """Limit what each host may send to the other within the block."""
        rate = f"{round(mbit_per_s * 1000)}kbit"
        with self._shaped("tbf", "rate", rate, "burst", "16kb", "latency", "200ms"):
            yield

    @contextmanager
    def _shaped(self, *qdisc: str) -> Iterator[None]:
        for host in self.hosts.names:
            self._shape(host, *qdisc)
        try:
            yield
        finally:
            for host in self.hosts.names:
                self._run(host, "del", "root")

    def _shape(self, host: str, *qdisc: str) -> None:
        self._run(host, "replace", "root", *qdisc)

    def _run(self, host: str, verb: str, *rest: str) -> None:
        argv = ["tc", "qdisc", verb, "dev", self.hosts.interface, *rest]
        done = subprocess.run(
            self.hosts.command(host, argv), capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"

    # --- from outside

    @contextmanager
    def door(self, host: str, port: int, address: str = "127.0.0.1") -> Iterator[str]:
        """The URL by which this process reaches a server on one host, for as long as the block. It
        needs no network between the hosts and here."""
        relay = Relay(self.hosts, host, port, address)
        try:
            yield relay.url
        finally:
            relay.close()


def _network(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
