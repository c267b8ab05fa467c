"""Compile ``src`` into one shared library: no headers of torch, only a C++17 compiler.

Files that end in ``_kernels.cpp`` hold the inner loops and are compiled once per instruction set
(``ISAS``), with ``DS_CP_ISA`` naming it; the others are compiled once, for any processor of the
kind, with ``DS_CP_HAS_<ISA>`` for each variant that the compiler could make. A variant that it
cannot make is left out; the library tells at run time which ones the processor can take.

Standard library only: ``setup.py`` uses this file before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
LIBRARY = "_native.so"
COMPILERS = ("g++", "c++", "clang++")
DEADLINE = 300.0  # seconds that one file may take to compile
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip
_X86 = "-mavx2 -mfma -mbmi -mbmi2 -mf16c"
_X86_512 = f"{_X86} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
ISAS = {
    "avx512bf16": tuple(f"{_X86_512} -mavx512bf16".split()),
    "avx512": tuple(_X86_512.split()),
    "avx2": tuple(_X86.split()),
    "baseline": (),
}  # the best first; those with flags are for x86-64 only


class BuildError(Exception):
    """There is no library; the message is one line and says why."""


@dataclass(frozen=True)
class Built:
    """What a build made: ``isas`` are the variants within, ``left_out`` those that the compiler
    could not make."""

    path: Path
    compiler: str
    isas: tuple[str, ...]
    left_out: tuple[str, ...]


def stamp(sources: Path = SOURCES) -> str:
    """What a library made from these sources answers to ``ds_cp_stamp``."""
    found = hashlib.sha256(repr((FLAGS, ISAS)).encode())
    for file in sorted(sources.iterdir()):
        if file.suffix in (".cpp", ".h"):
            found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:32]


def build(folder: Path = HERE, compiler: str | None = None, sources: Path = SOURCES) -> Built:
    """Compile ``sources`` and put the library into ``folder``, in one rename, so that who loads it
    meanwhile gets the old one or the new one. Raises ``BuildError``."""
    program = _compiler(compiler)
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} cannot be written")
    isas = tuple(isa for isa in ISAS if not ISAS[isa] or platform.machine() in ("x86_64", "AMD64"))
    with tempfile.TemporaryDirectory(prefix="ds_cp_build_") as temporary:
        work = Path(temporary)
        able = _able(program, isas, work)
        units = _units(sources, able, stamp(sources), work)
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda unit: _run([program, *unit]), units))
        linked = work / LIBRARY
        objects = [unit[-1] for unit in units]
        _run([program, "-shared", "-o", str(linked), *objects, "-ldl", "-lpthread"])
        path = folder / LIBRARY
        beside = folder / f"{LIBRARY}.{os.getpid()}"
        try:
            shutil.copyfile(linked, beside)
            beside.replace(path)
        except OSError as err:
            raise BuildError(f"{path} cannot be written: {err.strerror}") from None
        finally:
            beside.unlink(missing_ok=True)
    return Built(path, program, able, tuple(isa for isa in isas if isa not in able))


def _compiler(asked: str | None) -> str:
    for name in (asked,) if asked else COMPILERS:
        if name and (found := shutil.which(name)):
            return found
    raise BuildError(f"there is no C++ compiler ({asked or ', '.join(COMPILERS)})")


def _able(program: str, isas: tuple[str, ...], work: Path) -> tuple[str, ...]:
    """Those of ``isas`` whose flags the compiler takes. Raises ``BuildError`` when it compiles
    nothing at all."""
    probe = work / "probe.cpp"
    probe.write_text("int probe() { return 0; }\n")
    able = []
    for isa in isas:
        try:
            _run([program, *FLAGS, *ISAS[isa], "-c", str(probe), "-o", str(work / "probe.o")])
        except BuildError:
            if not ISAS[isa]:
                raise
        else:
            able.append(isa)
    return tuple(able)


def _units(sources: Path, isas: tuple[str, ...], mark: str, work: Path) -> list[list[str]]:
    """The compiler's arguments for every object, the object last."""
    units = []
    has = [f"-DDS_CP_HAS_{isa.upper()}=1" for isa in isas]
    for file in sorted(sources.glob("*.cpp")):
        if file.stem.endswith("_kernels"):
            for isa in isas:
                flags = [*FLAGS, *ISAS[isa], f"-DDS_CP_ISA={isa}"]
                units.append([*flags, "-c", str(file), "-o", str(work / f"{file.stem}.{isa}.o")])
        else:
            flags = [*FLAGS, *has, f'-DDS_CP_STAMP="{mark}"']
            units.append([*flags, "-c", str(file), "-o", str(work / f"{file.stem}.o")])
    return units


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{argv[0]} took longer than {DEADLINE:.0f} s") from None
    except OSError as err:
        raise BuildError(f"{argv[0]} cannot be run: {err.strerror}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr[:200]]
        raise BuildError(f"{argv[0]} failed: {said[0].strip()}")
