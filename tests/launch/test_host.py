"""What a server makes on its host belongs to its user alone, whatever the umask; and another user
of the host who reaches for all of it gets nothing and does no harm."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.jobs import END_S, Job, command, post
from tests.launch.conftest import Start, Write

KV = {"tokens_per_rank": 512, "block_size": 16}
NOBODY = 65534
OF_TORCH = "torchinductor_"  # a folder that torch may make, for what is never compiled here
BODY = {"model": "tiny", "prompt": "Hi", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
# Another user's program: everything that it is given, it tries to open, read or talk to. Prints
# what it got, which is to be nothing. The standard library alone, and no file of the server's.
STRANGER = r"""
import json, os, socket, sys
wanted = json.load(sys.stdin)
got = []
os.chdir("/")  # as another user from here on, for good: who may not even read this Python
os.setgroups([])
os.setgid(wanted["uid"])
os.setuid(wanted["uid"])
for path in wanted["files"]:
    for flags in (os.O_RDONLY, os.O_WRONLY):
        try:
            os.close(os.open(path, flags | os.O_NONBLOCK))
        except OSError:
            continue
        got.append(["opened", path])
for name in wanted["names"]:
    for said in (b'{"type":"hello","rank":1,"pid":1}\n{"type":"lost","cause":"x"}\n', b"\0" * 9000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            try:
                sock.connect("\0" + name)
                sock.sendall(said)
                if sock.recv(100):
                    got.append(["answered", name])
            except ConnectionError:
                pass
for port in wanted["ports"]:
    for said in (b"\0" * 4096, b"\xff" * 4096, b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01" * 999):
        with socket.socket() as sock:
            sock.settimeout(60)
            try:
                sock.connect(("127.0.0.1", port))
                sock.sendall(said)
            except OSError:
                pass
for pid in wanted["pids"]:
    try:
        os.kill(pid, 0)
        got.append(["may signal", pid])
    except OSError:
        pass
print(json.dumps(got))
"""


def unix_names(processes: list[psutil.Process]) -> tuple[set[str], set[str]]:
    """Names of listening or bound local sockets of these processes: in the abstract namespace, and
    in folders."""
    inodes = set()
    for process in processes:
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            if found := re.fullmatch(r"socket:\[(\d+)\]", link_of(fd)):
                inodes.add(found[1])
    abstract, paths = set(), set()
    for line in Path("/proc/net/unix").read_text("utf-8", "replace").splitlines()[1:]:
        parts = line.split(maxsplit=7)
        if len(parts) == 8 and parts[6] in inodes:
            (abstract if parts[7].startswith("@") else paths).add(parts[7].removeprefix("@"))
    return abstract, paths


def link_of(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile
        return ""


def exposed(folder: Path) -> list[str]:
    """Files and folders below ``folder`` that others than their user could reach and read."""
    found = []
    for path in folder.iterdir():
        if path.name.startswith(OF_TORCH) and not any(path.iterdir()):
            continue
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode) or not mode & 0o077:
            continue  # of a folder that is closed to others, what is inside does not matter
        found.append(f"{path} {stat.S_IMODE(mode):o}")
    return found


def open_memory(processes: list[psutil.Process]) -> list[str]:
    """Memory without a name and files of /dev/shm that these processes have open or mapped, and
    that are not their user's alone; and files open for writing that others could write to."""
    wrong = []
    for process in processes:
        for place in ("fd", "map_files"):
            for path in Path(f"/proc/{process.pid}/{place}").iterdir():
                target = link_of(path)
                memory = target.startswith(("/memfd:ds_cp", "/dev/shm/"))
                try:
                    found = path.stat()
                except OSError:
                    continue
                if memory and (found.st_uid != os.getuid() or found.st_mode & 0o077):
                    wrong.append(f"{process.pid} {target} {found.st_mode:o}")
    return wrong


def shared_files(processes: list[psutil.Process]) -> set[str]:
    """Files of /dev/shm that these processes have open or mapped."""
    found = set()
    for process in processes:
        for place in ("fd", "map_files"):
            found |= {link_of(path) for path in Path(f"/proc/{process.pid}/{place}").iterdir()}
    return {target for target in found if target.startswith("/dev/shm/")}


def network(processes: list[psutil.Process]) -> tuple[set[int], list[str]]:
    """Ports that listen on loopback, and everything that has to do with anywhere else."""
    ports, beyond = set(), []
    for process in processes:
        for one in process.net_connections("inet"):
            ends = [end for end in (one.laddr, one.raddr) if end]
            if not all(is_loopback(end.ip) for end in ends):
                beyond.append(f"{process.pid} {one}")
            elif one.status == psutil.CONN_LISTEN:
                ports.add(one.laddr.port)
            elif one.status == psutil.CONN_NONE:
                beyond.append(f"{process.pid} {one}")
    return ports, beyond


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)  # IPv4 by a socket of IPv6
    return (mapped or address).is_loopback


def said(text: dict[str, Any]) -> str:
    answer: str = text["choices"][0]["text"]
    return answer


def stranger(job: Job, names: set[str], ports: set[int], files: list[str]) -> list[Any]:
    """What another user gets of all this."""
    wanted = {
        "uid": NOBODY, "names": sorted(names), "ports": sorted(ports), "files": files,
        "pids": [process.pid for process in job.processes()],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER], input=json.dumps(wanted),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got: list[Any] = json.loads(done.stdout)
    return got


@pytest.mark.skipif(
    not Path("/proc/self/map_files").is_dir(), reason="looks into /proc: run it on Linux"
)
def test_what_a_server_makes_is_its_users_alone(
    start: Start, config: Write, tmp_path: Path
) -> None:
    """With a umask that hides nothing. Two ranks, and the processes that render templates and
    compile grammars."""
    file = config(kv_cache=KV, threads_per_rank=1)
    serve = command("ds-cp", "serve", 2, ["--config", file])
    job = start(["bash", "-c", 'umask 000; exec "$@"', "bash", *serve])
    url = job.ready()
    before = said(post(f"{url}/v1/completions", BODY))
    spelled = said(
        post(f"{url}/v1/completions", BODY | {"guided_regex": "[0-9]{3}", "ignore_eos": False})
    )
    assert re.fullmatch("[0-9]{1,3}", spelled), spelled
    processes = job.processes()
    assert len([p for p in processes if "worker_process" in " ".join(p.cmdline())]) >= 2

    ports, beyond = network(processes)
    assert beyond == [], job.story()
    assert int(url.rsplit(":", 1)[1].strip("/")) in ports
    abstract, paths = unix_names(processes)
    assert len(abstract) >= 1 and all(name.startswith("ds_cp/") for name in abstract), abstract
    assert not [path for path in paths if exposed(Path(path).parent.parent)], paths
    assert open_memory(processes) == [], job.story()
    assert exposed(Path(job.temporary)) == [], job.story()
    made = shared_files(processes)

    if os.getuid() == 0:  # only root can become another user
        files = [
            *made,
            *(str(path) for path in Path(job.temporary).rglob("*") if not path.is_dir()),
        ]
        for process in processes:
            for place in ("mem", "environ", "maps", "fd/0", "cwd/x"):
                files.append(f"/proc/{process.pid}/{place}")
            files += [str(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        got = stranger(job, abstract, ports, files)
        assert got == [], job.story()
    assert said(post(f"{url}/v1/completions", BODY)) == before
    assert job.process.poll() is None and "ds_cp: error" not in job.err, job.story()
    job.process.terminate()
    job.gone(2 * END_S)
    assert job.process.returncode == 0, job.story()
    assert [file for file in made if os.path.exists(file)] == []
    left = [path for path in job.temporary.rglob("*") if not path.name.startswith(OF_TORCH)]
    assert left == []
