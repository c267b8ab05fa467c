"""Two hosts on one machine, for tests: network namespaces joined by a veth pair.

Each host has its own network, its own host name (UTS namespace) and its own ``/etc/hosts``, so MPI,
gloo and people see two machines. Both can have a container bridge of one address, as hosts with
Docker do: ``docker0``, listed before the link. (Open MPI would try to connect by it, unless it is
given the interface.) Everything runs in one PID namespace whose first process ends with us:
whatever happens, nothing started here stays behind.

    with two_hosts() as hosts:
        done = hosts.run_mpirun([sys.executable, "script.py"], slots=(2, 2), timeout_s=120)
        assert done.returncode == 0, done.stdout
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

INTERFACE = "veth0"
PREFIX = 24  # bits of the network of ``ADDRESSES``
ADDRESSES = ("10.77.0.1", "10.77.0.2")
ADDRESSES_V6 = ("fd77::1", "fd77::2")
_NET = 0x40000000  # CLONE_NEWNET
BRIDGE = ("docker0", "172.17.0.1/16")  # the same on both hosts

# First process of the PID namespace. It ends when our end of its stdin closes, also when we are
# killed, and takes every process of the namespace with it. A shell, not cat alone, reaps orphans.
_INIT = "echo ready; cat >/dev/null; exit 0"
# First process of a host. $1 name, $2 hosts file. "$$" is its pid inside the PID namespace. A sysfs
# of its own shows this host's interfaces.
_HOST = (
    'echo "$1" >/proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts '
    "&& mount -t sysfs sysfs /sys && ip link set lo up && echo $$ && exec sleep 2147483647"
)
# mpirun calls it as: agent HOST COMMAND...; the command is one for a shell.
_AGENT = """#!/bin/sh
host=$1
shift
case "$host" in
{cases}
*) echo "no such host: $host" >&2; exit 1 ;;
esac
exec nsenter --target "$pid" --net --uts --mount -- sh -c "$*"
"""


class NamespaceError(Exception):
    """Two hosts cannot be made here; the message says why, for ``pytest.skip``."""


@dataclass(frozen=True)
class Hosts:
    """Two running hosts; ``names[i]`` has the addresses ``addresses[i]`` and ``addresses_v6[i]`` on
    ``interface``, and ``hosts_files[i]`` as ``/etc/hosts``: write into it, do not replace it."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    addresses_v6: tuple[str, str]
    interface: str
    hosts_files: tuple[Path, Path]
    init_pid: int  # of the PID namespace's first process, seen from outside
    host_pids: tuple[int, int]  # of each host's first process, seen from inside
    agent: Path

    def command(self, host: str, argv: Sequence[str], cwd: str | Path | None = None) -> list[str]:
        """The command line that runs ``argv`` on one host."""
        pid = self.host_pids[self.names.index(host)]
        enter = ["nsenter", "--target", str(self.init_pid), "--pid", "--mount", "--"]
        enter += ["nsenter", "--target", str(pid), "--net", "--uts", "--mount", "--"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd or os.getcwd()), *argv]

    def popen(
        self,
        host: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start ``argv`` on one host; stdout and stderr come in one pipe.

        Signals to the returned process do not reach ``argv``, its grandchild in another PID
        namespace: ``run`` a ``kill`` on the host for that. Leaving ``two_hosts`` ends it anyway.
        """
        return subprocess.Popen(
            self.command(host, argv, cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ if env is None else env),
        )

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        timeout_s: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` on one host; stdout holds both streams.

        Past ``timeout_s`` both hosts are ended at once and ``subprocess.TimeoutExpired`` (its
        ``output`` is what was printed so far) is raised.
        """
        with self.popen(host, argv, env=env, cwd=cwd) as process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as err:
                os.kill(self.init_pid, signal.SIGKILL)
                output, _ = process.communicate(timeout=10)
                raise subprocess.TimeoutExpired(list(argv), timeout_s, output) from err
        return subprocess.CompletedProcess(list(argv), process.returncode, output)

    def mpirun_argv(
        self, argv: Sequence[str], slots: tuple[int, int] = (2, 2), map_by: str = "slot"
    ) -> list[str]:
        """The mpirun command that starts ``slots[i]`` ranks of ``argv`` on host ``i``; to be run
        on the first host. ``map_by``: ``slot`` numbers ranks host by host, ``node`` in turn."""
        mpirun = Path(sys.executable).with_name("mpirun")
        where = ",".join(f"{name}:{n}" for name, n in zip(self.names, slots, strict=True) if n)
        return [
            str(mpirun if mpirun.exists() else "mpirun"),
            *("--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
            *("--host", where, "--map-by", map_by, "-np", str(sum(slots))),
            *("--prtemca", "plm_ssh_agent", str(self.agent)),
            *argv,
        ]

    def run_mpirun(
        self,
        argv: Sequence[str],
        *,
        slots: tuple[int, int] = (2, 2),
        map_by: str = "slot",
        timeout_s: float = 120.0,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` as an MPI job over both hosts (see ``run`` and ``mpirun_argv``).

        In a temporary folder of its own: process ids are small here, and a file that a killed
        mpirun left under the same one would keep this one from starting.
        """
        job = self.mpirun_argv(argv, slots, map_by)
        with tempfile.TemporaryDirectory() as own:
            env = dict(os.environ if env is None else env) | {"TMPDIR": own}
            return self.run(self.names[0], job, timeout_s=timeout_s, env=env, cwd=cwd)


@contextmanager
def two_hosts(
    names: tuple[str, str] = ("nodea", "nodeb"), *, bridge: bool = False
) -> Iterator[Hosts]:
    """Make two hosts, with a container bridge if asked, and end every process on them afterwards.

    ``NamespaceError`` where that is not permitted.
    """
    for tool in ("unshare", "nsenter", "ip", "mount", "sh"):
        if shutil.which(tool) is None:
            raise NamespaceError(f"{tool} is not installed (util-linux, iproute2)")
    if os.geteuid() != 0:
        raise NamespaceError("needs root to make network namespaces (or a container's)")
    with tempfile.TemporaryDirectory(prefix="two-hosts-") as folder:
        hosts_files = (Path(folder, "hosts0"), Path(folder, "hosts1"))
        for hosts_file in hosts_files:
            hosts_file.write_text(hosts_text(dict(zip(ADDRESSES, names, strict=True))))
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        init = subprocess.Popen(
            [*unshare, "sh", "-c", _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        holders: list[subprocess.Popen[str]] = []
        try:
            _expect(init, "ready")
            init_pid = _only_child(init.pid)
            enter = ["nsenter", "--target", str(init_pid), "--pid", "--mount", "--"]
            host_pids = []
            for name, hosts_file in zip(names, hosts_files, strict=True):
                argv = ["unshare", "--net", "--uts", "--mount", "sh", "-c", _HOST]
                holder = subprocess.Popen(
                    [*enter, *argv, "host", name, str(hosts_file)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                holders.append(holder)
                host_pids.append(int(_expect(holder)))
            agent = Path(folder, "agent")
            cases = "\n".join(
                f"{name}|{address}) pid={pid} ;;"
                for name, address, pid in zip(names, ADDRESSES, host_pids, strict=True)
            )
            agent.write_text(_AGENT.format(cases=cases))
            agent.chmod(0o755)
            hosts = Hosts(
                names, ADDRESSES, ADDRESSES_V6, INTERFACE, hosts_files,
                init_pid, (host_pids[0], host_pids[1]), agent,
            )  # fmt: skip
            _join(hosts, bridge)
            yield hosts
        finally:
            init.kill()  # --kill-child ends the first process of the namespace, and that all others
            for process in (init, *holders):
                process.communicate(timeout=10)


def hosts_text(entries: Mapping[str, str]) -> str:
    """An ``/etc/hosts`` of these addresses and their names, with loopback's own."""
    # The store of torch looks up its clients by their IPv4 address mapped into IPv6: with an answer
    # here it does not ask a name server that cannot be reached.
    mapped = {f"::ffff:{ip}": f"client{i}" for i, ip in enumerate(ADDRESSES)}
    entries = {"127.0.0.1": "localhost", "::ffff:127.0.0.1": "client"} | mapped | dict(entries)
    return "".join(f"{ip} {name}\n" for ip, name in entries.items())


def _join(hosts: Hosts, with_bridge: bool) -> None:
    a, b = (str(pid) for pid in hosts.host_pids)
    enter = ["nsenter", "--target", str(hosts.init_pid), "--pid", "--mount", "--"]
    link = ["ip", "link", "add", INTERFACE, "netns", a, "type", "veth"]
    bridge, bridge_address = BRIDGE
    commands = []
    for name in hosts.names if with_bridge else ():
        for args in (
            ["link", "add", bridge, "type", "bridge"],
            ["addr", "add", bridge_address, "dev", bridge],
            ["link", "set", bridge, "up"],
        ):
            commands.append(hosts.command(name, ["ip", *args]))
    commands.append([*enter, *link, "peer", "name", INTERFACE, "netns", b])
    for name, v4, v6 in zip(hosts.names, hosts.addresses, hosts.addresses_v6, strict=True):
        for args in (
            ["addr", "add", f"{v4}/{PREFIX}", "dev", INTERFACE],
            ["addr", "add", f"{v6}/64", "dev", INTERFACE, "nodad"],
            ["link", "set", INTERFACE, "up"],
        ):
            commands.append(hosts.command(name, ["ip", *args]))
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise NamespaceError(f"{command[-6:]}: {done.stderr.strip() or 'failed'}")


def _expect(process: subprocess.Popen[str], text: str | None = None) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if (text is None and not line.isdecimal()) or (text is not None and line != text):
        raise NamespaceError(f"namespaces are not permitted here: {line or 'no answer'}")
    return line


def _only_child(pid: int) -> int:
    (child,) = psutil.Process(pid).children()
    return int(child.pid)


class Relay:
    """Has a server that listens on one host reached from here: ``url`` leads to ``port`` of its
    loopback, or of another address of it. Its sockets there are made by a thread that has entered
    that host's network."""

    def __init__(self, hosts: Hosts, host: str, port: int, address: str = "127.0.0.1") -> None:
        self._target = (address, port)
        self._namespace = f"/proc/{outer_pid(hosts, host)}/ns/net"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _run(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(self._namespace, encoding="ascii") as namespace:
            if libc.setns(namespace.fileno(), _NET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, 10)
                far.settimeout(None)
            except OSError:
                if self._listener.fileno() < 0:
                    return
                near.close()
                continue
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


def outer_pid(hosts: Hosts, host: str) -> int:
    """The process id, as seen from here, of a host's first process."""
    wanted = hosts.host_pids[hosts.names.index(host)]
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            text = Path(f"/proc/{process.pid}/status").read_text("ascii", errors="replace")
            line = next(line for line in text.splitlines() if line.startswith("NSpid:"))
            inner = [int(word) for word in line.split()[1:]]
            init = os.stat(f"/proc/{hosts.init_pid}/ns/pid").st_ino
            if inner[-1] == wanted and os.stat(f"/proc/{process.pid}/ns/pid").st_ino == init:
                return int(process.pid)
    raise NamespaceError(f"no first process of {host}")
