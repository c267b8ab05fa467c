"""ssh between the two hosts of ``netns``: an sshd on each, with keys of their own.

What the machine has under ``~/.ssh`` and ``/etc/ssh`` is neither read nor changed: on these hosts
other files are mounted over it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.jobs import busy
from tests.helpers.netns import NamespaceError
from tests.helpers.slurm import which
from tests.helpers.two_hosts import HostPair

UP_S = 30.0  # seconds for an sshd to answer

_SSHD = """
ListenAddress {address}
HostKey {folder}/host
AuthorizedKeysFile {folder}/own.pub
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
"""
_SSH = """
IdentityFile {folder}/own
IdentitiesOnly yes
BatchMode yes
StrictHostKeyChecking yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
ConnectTimeout 20
LogLevel ERROR
"""
# On each host: $1 its ssh_config. sshd wants its folder under /run.
_PREPARE = (
    'mount --bind "$1" /etc/ssh/ssh_config && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd '
    "&& { [ ! -d ~/.ssh ] || mount -t tmpfs tmpfs ~/.ssh; }"
)
DAEMONS = ("/sshd -D", "sshd: ")  # stay up: for ``HostPair.until_empty``


def missing() -> str | None:
    """Why ssh cannot be had here, and how to get it; None where it can be tried."""
    absent = [tool for tool in ("ssh", "sshd", "ssh-keygen") if which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install openssh-server openssh-client"
    return None


@contextmanager
def ssh_between(pair: HostPair, folder: Path) -> Iterator[None]:
    """Let root go from each host to each, by name and without a password, with its files in
    ``folder``. Raises ``NamespaceError`` where an sshd does not answer."""
    hosts = pair.hosts
    for name in ("own", "host"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)],
            check=True,
            timeout=60,
        )
    kind, key, *_ = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"{','.join(hosts.names)} {kind} {key}\n")
    client = folder / "ssh_config"
    client.write_text(_SSH.format(folder=folder))
    sshd = which("sshd")
    assert sshd is not None, missing()
    servers = []
    try:
        for host, address in zip(hosts.names, hosts.addresses, strict=True):
            prepare = ["sh", "-c", _PREPARE, "sh", str(client)]
            done = hosts.run(host, prepare)
            if done.returncode:
                raise NamespaceError(f"ssh cannot be prepared on {host}: {done.stdout}")
            config = folder / f"sshd_config.{host}"
            config.write_text(_SSHD.format(address=address, folder=folder))
            # With a clean environment, as a machine's own: nothing of the job reaches the other
            # host unless the launcher sends it.
            servers.append(
                subprocess.Popen(
                    hosts.command(host, [sshd, "-D", "-f", str(config)], "/"),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=(folder / f"sshd.{host}.log").open("wb"),
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                )
            )
        for host in hosts.names:
            _until_answer(pair, host, folder)
        yield
    finally:
        pair.clear()
        for server in servers:
            server.kill()
            server.wait(20)


def _until_answer(pair: HostPair, host: str, folder: Path) -> None:
    end = time.monotonic() + UP_S * busy()
    while True:
        done = pair.hosts.run(pair.hosts.names[0], ["ssh", host, "hostname"], env=dict(os.environ))
        if done.returncode == 0 and done.stdout.strip() == host:
            return
        if time.monotonic() > end:
            log = (folder / f"sshd.{host}.log").read_text()[-1000:]
            raise NamespaceError(f"sshd on {host} does not answer: {done.stdout} {log}")
        time.sleep(0.2)
