"""Compile ``src`` into one shared library: no headers of torch, only a C++17 compiler.

Files that end in ``_kernels.cpp`` hold the inner loops and are compiled once per instruction set
(``ISAS``), with ``DS_CP_ISA`` naming it; the others are compiled once, for any processor of the
kind, with ``DS_CP_HAS_<ISA>`` for each variant that the compiler could make. A variant of which it
cannot make a file is left out; the library tells at run time which ones the processor can take.

Standard library only: ``setup.py`` uses this file before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
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
    meanwhile gets the old one or the new one. ``compiler``: a program, with arguments if need be
    (``ccache g++``). Raises ``BuildError``."""
    program = _compiler(compiler)
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} cannot be written")
    isas = tuple(isa for isa in ISAS if not ISAS[isa] or platform.machine() in ("x86_64", "AMD64"))
    try:
        with tempfile.TemporaryDirectory(prefix="ds_cp_build_") as temporary:
            linked, able = _linked(program, isas, sources, Path(temporary))
            path = folder / LIBRARY
            _put(linked, path)
    except OSError as err:  # no room for temporary files, for one
        raise BuildError(f"the build cannot write its files: {err.strerror or err}") from None
    left_out = tuple(isa for isa in isas if isa not in able)
    return Built(path, shlex.join(program), able, left_out)


def _linked(
    program: list[str], isas: tuple[str, ...], sources: Path, work: Path
) -> tuple[Path, tuple[str, ...]]:
    """The library in ``work``, and the variants in it."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        able = _able(program, isas, work)
        kernels = {isa: _kernel_units(sources, isa, work) for isa in able}
        made = {isa: [pool.submit(_run, [*program, *u]) for u in kernels[isa]] for isa in able}
        for isa in able[:-1]:
            if any(isinstance(one.exception(), BuildError) for one in made[isa]):
                del kernels[isa]
        for isa in kernels:
            for one in made[isa]:
                one.result()
        able = tuple(kernels)
        units = _common_units(sources, able, stamp(sources), work)
        list(pool.map(lambda unit: _run([*program, *unit]), units))
    linked = work / LIBRARY
    objects = [unit[-1] for unit in (*units, *(u for isa in able for u in kernels[isa]))]
    _run([*program, "-shared", "-o", str(linked), *objects, "-ldl", "-lpthread"])
    return linked, able


def _put(linked: Path, path: Path) -> None:
    beside = path.with_name(f"{LIBRARY}.{os.getpid()}")
    try:
        shutil.copyfile(linked, beside)
        beside.chmod(0o755)  # whatever the umask: others run what lies here, and may not change it
        beside.replace(path)
    except OSError as err:
        raise BuildError(f"{path} cannot be written: {err.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def _compiler(asked: str | None) -> list[str]:
    """The compiler's path and the arguments that it was asked for with."""
    for name in (asked,) if asked else COMPILERS:
        try:
            program, *more = [name] if shutil.which(name) else shlex.split(name)
        except ValueError:  # nothing, or a quotation mark that is not closed
            continue
        if found := shutil.which(program):
            return [found, *more]
    raise BuildError(f"there is no C++ compiler ({asked or ', '.join(COMPILERS)})")


def _able(program: list[str], isas: tuple[str, ...], work: Path) -> tuple[str, ...]:
    """Those of ``isas`` whose flags the compiler takes. Raises ``BuildError`` when it compiles
    nothing at all."""
    probe = work / "probe.cpp"
    probe.write_text("int probe() { return 0; }\n")
    able = []
    for isa in isas:
        try:
            _run([*program, *FLAGS, *ISAS[isa], "-c", str(probe), "-o", str(work / "probe.o")])
        except BuildError:
            if not ISAS[isa]:
                raise
        else:
            able.append(isa)
    return tuple(able)


def _kernel_units(sources: Path, isa: str, work: Path) -> list[list[str]]:
    """The compiler's arguments for every object of a variant, the object last."""
    flags = [*FLAGS, *ISAS[isa], f"-DDS_CP_ISA={isa}"]
    return [
        [*flags, "-c", str(file), "-o", str(work / f"{file.stem}.{isa}.o")]
        for file in sorted(sources.glob("*_kernels.cpp"))
    ]


def _common_units(sources: Path, isas: tuple[str, ...], mark: str, work: Path) -> list[list[str]]:
    """The same for what is compiled once, with these variants."""
    has = [f"-DDS_CP_HAS_{isa.upper()}=1" for isa in isas]
    flags = [*FLAGS, *has, f'-DDS_CP_STAMP="{mark}"']
    return [
        [*flags, "-c", str(file), "-o", str(work / f"{file.stem}.o")]
        for file in sorted(sources.glob("*.cpp"))
        if not file.stem.endswith("_kernels")
    ]


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
