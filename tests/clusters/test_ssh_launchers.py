"""deepspeed's hostfile over pdsh and ssh, and mpirun's over ssh: two hosts with an sshd each."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.conftest import GREEDY, HOW, KV, begun, port_of
from tests.helpers import sshd
from tests.helpers.jobs import BIN, START_S, Job, json_lines
from tests.helpers.netns import NamespaceError
from tests.helpers.streams import Stream
from tests.helpers.tiny import NEW, write_prompts
from tests.helpers.two_hosts import HostPair
from tests.launch.conftest import Write

pytestmark = [pytest.mark.netns, pytest.mark.slow]

END_S = 30.0  # for a job to be gone from both hosts, drain included


@pytest.fixture(scope="module")
def hosts(pair: HostPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostPair]:
    """Two hosts between which ssh goes without a password."""
    if why := sshd.missing():
        pytest.skip(f"{why}; {HOW}")
    try:
        with sshd.ssh_between(pair, tmp_path_factory.mktemp("ssh")):
            yield pair
    except NamespaceError as err:
        pytest.skip(f"{err}; {HOW}")


def launch(hosts: HostPair, launcher: str, folder: Path, words: list[str]) -> Job:
    """As the guide says it, from the first host, with a hostfile of two ranks each."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=2\n" for name in hosts.hosts.names))
    program = str(BIN / launcher)
    if launcher == "deepspeed":
        if shutil.which("pdsh") is None:
            pytest.skip(f"pdsh not installed: apt-get install pdsh; {HOW}")
        address = ["--master_addr", hosts.hosts.names[0]]
        argv = [program, "--hostfile", str(hostfile), *address, *words]
    else:
        pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install ds_cp[mpi]")
        # Of this machine, not of a cluster: all is one checkout, and root's.
        root = ["--allow-run-as-root", "--oversubscribe", "-x", "PYTHONPATH"]
        size = ["-np", "4", "--hostfile", str(hostfile), "--bind-to", "none"]
        argv = [program, *root, *size, sys.executable, *words]
    return hosts.start(hosts.hosts.names[0], argv, folder)


def ends(hosts: HostPair, job: Job, limit_s: float = END_S) -> None:
    job.until("the end of the launcher", lambda: job.process.poll() is not None, limit_s)
    hosts.until_empty(limit_s, but=sshd.DAEMONS)


def serve(hosts: HostPair, launcher: str, folder: Path, file: str) -> Job:
    return launch(hosts, launcher, folder, ["launch/serve.py", "--config", file])


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_generate(
    launcher: str, hosts: HostPair, config: Write, folder: Path, expected: list[list[int]]
) -> None:
    prompts = write_prompts(folder / "prompts.jsonl")
    args = ["--config", config(), "--prompts-file", prompts, "--max-tokens", str(NEW), "--json"]
    job = launch(hosts, launcher, folder, ["launch/generate.py", *args])
    ends(hosts, job, START_S)
    assert job.process.returncode == 0, job.story()
    mark = "nodea: " if launcher == "deepspeed" else ""  # pdsh says whose line it is
    output = "\n".join(line.removeprefix(mark) for line in job.out.splitlines())
    assert [o["outputs"][0]["token_ids"] for o in json_lines(output)] == expected, job.story()
    assert "2 hosts: nodea ranks 0-1, nodeb ranks 2-3" in job.err, job.story()


def test_deepspeed_drains_after_sigterm(hosts: HostPair, config: Write, folder: Path) -> None:
    job = serve(hosts, "deepspeed", folder, config(kv_cache=KV, threads_per_rank=1))
    port = job.until("ready", lambda: port_in(job), START_S)
    with hosts.door("nodea", port) as url:
        expected = Stream(url, GREEDY).end()
        stream = begun(job, Stream(url, GREEDY))
        hosts.signal("nodea", "bin/deepspeed", signal.SIGTERM)
        assert stream.end() == expected, job.story()
    ends(hosts, job)


def test_deepspeed_outlives_a_worker(hosts: HostPair, config: Write, folder: Path) -> None:
    """Of the other host; another one takes its place."""
    file = config(kv_cache=KV, threads_per_rank=1, fault_tolerance={"spare_after_s": None})
    job = serve(hosts, "deepspeed", folder, file)
    port = job.until("ready", lambda: port_in(job), START_S)
    with hosts.door("nodea", port) as url:
        expected = Stream(url, GREEDY).end()
        stream = begun(job, Stream(url, GREEDY))
        hosts.matching("nodeb", "serve.worker_process")[-1].kill()
        assert stream.end() == expected, job.story()
    hosts.signal("nodea", "bin/deepspeed", signal.SIGTERM)
    ends(hosts, job)
    assert "all ranks have met again (generation 1" in job.err, job.story()


def test_mpirun_serves(hosts: HostPair, config: Write, folder: Path) -> None:
    """mpirun kills a quarter of a second after its SIGTERM, and tells the other host so."""
    job = serve(hosts, "mpirun", folder, config(kv_cache=KV, threads_per_rank=1))
    with hosts.door("nodea", port_of(job)) as url:
        expected = Stream(url, GREEDY).end()
        assert Stream(url, GREEDY).end() == expected
    hosts.signal("nodea", "mpirun", signal.SIGTERM)
    ends(hosts, job)


def port_in(job: Job) -> int | None:
    """The port of a server whose lines begin with the host's name."""
    assert job.process.poll() is None, job.story()
    for line in job.out.splitlines():
        before, found, rest = line.partition("ds_cp ready: http://127.0.0.1:")
        if found and before in ("", "nodea: "):
            return int(rest.split()[0].strip("/"))
    return None
