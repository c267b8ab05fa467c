"""A Slurm cluster of two nodes on one machine, for tests: its own munge, controller and daemons.

The nodes are the hosts of ``netns``, so Slurm and the job see two machines. Nothing of a Slurm that
is installed here is read or changed, and all daemons end with the hosts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.jobs import ROOT, Job, busy, clean_environment
from tests.helpers.netns import NamespaceError
from tests.helpers.two_hosts import HostPair

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue")
UP_S = 45.0  # seconds for both nodes to be idle
DAEMONS = ("munged", "slurmctld", "slurmd")  # stay up: for ``HostPair.until_empty``
KILL_WAIT_S = 30  # KillWait: Slurm's default, from SIGTERM to SIGKILL

# Nothing of cgroups, accounting or mail: what a container lets one run. The nodes say that they
# have more processors than there are, as ranks share them.
_CONFIG = """
ClusterName=test
SlurmctldHost={a}({ip_a})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName={a} NodeAddr={ip_a} CPUs=64 RealMemory=1000 State=UNKNOWN
NodeName={b} NodeAddr={ip_b} CPUs=64 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be made here, and how to get one; None where it can be tried."""
    absent = [tool for tool in TOOLS if which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    return None


def which(tool: str) -> str | None:
    """The path of a program, also one for the administrator."""
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


@dataclass(frozen=True)
class Slurm:
    """A running cluster; its controller, and where commands are typed, is the first host."""

    pair: HostPair
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a command of Slurm needs, and no trace of the job that the tests may be."""
        return clean_environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, argv: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run a command of Slurm on the first host, from the repository; what it printed."""
        host = self.pair.hosts.names[0]
        done = self.pair.hosts.run(host, argv, timeout_s=timeout_s, env=self.environment, cwd=ROOT)
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}"
        return done.stdout

    def start(self, argv: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> Job:
        """Start a command such as srun on the first host."""
        host = self.pair.hosts.names[0]
        return self.pair.start(host, argv, folder, self.environment | dict(env or {}))

    def state(self, job: str) -> str:
        """The state of a batch job: ``RUNNING``, ``COMPLETED``."""
        text = self.run(["scontrol", "--oneliner", "show", "job", job])
        return next(word[9:] for word in text.split() if word.startswith("JobState="))

    def logs(self) -> str:
        """The ends of what the daemons wrote."""
        ends = [f"--- {f.name}\n{f.read_text()[-3000:]}" for f in sorted(self.folder.glob("*.log"))]
        return "\n".join(ends)

    def until_idle(self, limit_s: float) -> None:
        """Wait until no job is left on any node."""
        end = time.monotonic() + limit_s * busy()
        while (found := self.nodes()) != ["idle", "idle"] or self.run(["squeue", "--noheader"]):
            assert time.monotonic() < end, f"{found}\n{self.run(['squeue'])}\n{self.logs()}"
            time.sleep(0.2)

    def nodes(self) -> list[str]:
        """The state of each node; empty while the controller does not answer."""
        argv = ["sinfo", "--noheader", "--Node", "--format=%T"]
        host = self.pair.hosts.names[0]
        done = self.pair.hosts.run(host, argv, timeout_s=60, env=self.environment)
        return done.stdout.split() if done.returncode == 0 else []


@contextmanager
def slurm_cluster(pair: HostPair, folder: Path) -> Iterator[Slurm]:
    """Start the cluster on two hosts, with its files in ``folder``; it ends with the hosts.

    Raises ``NamespaceError`` where it does not come up, with the daemons' own words.
    """
    hosts = pair.hosts
    for name in ("state", *(f"spool.{host}" for host in hosts.names)):
        (folder / name).mkdir()
    (a, b), (ip_a, ip_b) = hosts.names, hosts.addresses
    (folder / "slurm.conf").write_text(
        _CONFIG.format(folder=folder, a=a, b=b, ip_a=ip_a, ip_b=ip_b, kill_wait=KILL_WAIT_S)
    )
    # slurmd reads it though nothing here uses cgroups; this plugin asks for none that is mounted.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    slurm = Slurm(pair, folder)
    munge = [
        *("--foreground", "--force", "--num-threads=2", f"--key-file={key}"),
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munge.seed",
    ]
    daemons = [
        (a, ["munged", *munge]),
        (a, ["slurmctld", "-D", "-c"]),
        *((host, ["slurmd", "-D", "-N", host]) for host in hosts.names),
    ]
    started: list[subprocess.Popen[bytes]] = []
    with (folder / "daemons.log").open("wb") as log:
        try:
            for host, (program, *options) in daemons:
                path = which(program)
                assert path is not None, missing()
                started.append(
                    subprocess.Popen(
                        hosts.command(host, [path, *options]),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=slurm.environment,
                    )
                )
                if program == "munged":
                    _until_socket(folder / "munge.socket", slurm)
            end = time.monotonic() + UP_S * busy()
            while slurm.nodes() != ["idle", "idle"]:
                late = time.monotonic() > end
                if late or any(daemon.poll() is not None for daemon in started):
                    raise NamespaceError(f"Slurm did not come up: {slurm.logs()}")
                time.sleep(0.2)
            yield slurm
        finally:
            pair.clear()
            for daemon in started:
                daemon.kill()
                daemon.wait(20)


def _until_socket(path: Path, slurm: Slurm) -> None:
    end = time.monotonic() + UP_S * busy()
    while not path.is_socket():
        if time.monotonic() > end:
            raise NamespaceError(f"munged did not come up: {slurm.logs()}")
        time.sleep(0.05)
