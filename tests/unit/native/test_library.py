"""The native library: a build that is found, and a reason whenever there is none."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from ds_cp.native import Library, load
from ds_cp.native.build import LIBRARY, SOURCES, BuildError, _put, build, stamp
from tests.helpers.native import native_library

SMALL = """
#include "isa.h"
DS_CP_EXPORT const char* ds_cp_stamp() { return DS_CP_STAMP; }
DS_CP_EXPORT const char* ds_cp_isas() { return "baseline"; }
DS_CP_EXPORT long answer(long x) { return x + 42; }
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Sources of a library that compile in a moment."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        pytest.skip("needs a C++ compiler: apt-get install g++")
    folder = tmp_path / "src"
    folder.mkdir()
    shutil.copy(SOURCES / "isa.h", folder)
    (folder / "small.cpp").write_text(SMALL)
    return folder


def test_what_is_built_is_loaded_and_answers(sources: Path, tmp_path: Path) -> None:
    built = build(tmp_path, sources=sources)
    assert built.path == tmp_path / LIBRARY and "baseline" in built.isas
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == [LIBRARY]  # nothing half done
    library = load(tmp_path, sources)
    assert isinstance(library, Library)
    assert library.function("answer", [ctypes.c_long], ctypes.c_long)(1) == 43


def test_changed_sources_are_not_answered_by_an_old_library(sources: Path, tmp_path: Path) -> None:
    build(tmp_path, sources=sources)
    before = stamp(sources)
    (sources / "small.cpp").write_text(SMALL.replace("42", "43"))
    assert stamp(sources) != before
    reason = load(tmp_path, sources)
    assert isinstance(reason, str) and "other sources" in reason and "ds_cp.native" in reason


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    reason = load(tmp_path)
    assert isinstance(reason, str) and "not built" in reason


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_a_broken_library_is_a_reason(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LIBRARY).write_bytes(content)
    reason = load(tmp_path)
    assert isinstance(reason, str) and ("broken" in reason or "cannot be loaded" in reason)


def test_a_library_that_was_cut_short_is_a_reason(sources: Path, tmp_path: Path) -> None:
    whole = build(tmp_path, sources=sources).path.read_bytes()
    for part in (len(whole) // 3, len(whole) - 1):
        folder = tmp_path / str(part)
        folder.mkdir()
        (folder / LIBRARY).write_bytes(whole[:part])
        reason = load(folder, sources)
        assert isinstance(reason, str) and "cut short" in reason


def test_a_missing_compiler_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no C\\+\\+ compiler \\(/nowhere/g\\+\\+\\)"):
        build(tmp_path, "/nowhere/g++")


def test_a_compiler_that_fails_is_said_in_one_line(sources: Path, tmp_path: Path) -> None:
    (sources / "small.cpp").write_text("#error out of order\n")
    with pytest.raises(BuildError, match="out of order") as caught:
        build(tmp_path, sources=sources)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / LIBRARY).exists()


def test_the_compiler_may_have_arguments(sources: Path, tmp_path: Path) -> None:
    """As in CXX="ccache g++": a program that runs another, with arguments for both."""
    (sources / "small.cpp").write_text("#ifndef ASKED\n#error not asked\n#endif\n" + SMALL)
    for asked in ('env "A=a b" g++ -DASKED', "g++ -DASKED"):
        built = build(tmp_path, asked, sources)
        assert "-DASKED" in built.compiler
    for wrong in ('"', "  ", "env-that-is-not-there g++"):
        with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
            build(tmp_path, wrong, sources)


def test_a_variant_that_does_not_compile_is_left_out(sources: Path, tmp_path: Path) -> None:
    fails = sources / "some_kernels.cpp"
    fails.write_text("#ifdef __AVX512F__\n#error too new\n#endif\n")
    built = build(tmp_path, sources=sources)
    assert "baseline" in built.isas and not any("512" in isa for isa in built.isas)
    if platform.machine() == "x86_64":
        assert "avx2" in built.isas and {"avx512", "avx512bf16"} <= {*built.left_out}
    assert isinstance(load(tmp_path, sources), Library)
    fails.write_text("#ifndef __AVX2__\n#error too old\n#endif\n")
    with pytest.raises(BuildError, match="too old"):  # the baseline must be there
        build(tmp_path, sources=sources)


def test_no_room_for_temporary_files_is_said_in_one_line(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mkdtemp", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile if name == "mkdtemp" else Path, name, full)
            with pytest.raises(BuildError, match="No space left on device"):
                build(tmp_path, sources=sources)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere: run it as another user")
def test_a_folder_that_cannot_be_written_is_said(sources: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(BuildError, match="cannot be written"):
        build(closed, sources=sources)


def test_threads_are_those_of_torch() -> None:
    seen = native_library().function("ds_cp_threads_seen", [ctypes.c_int64] * 2, ctypes.c_int64)
    torch.ones(1 << 20).sum()  # its pool is there
    assert seen(200, 1) == 1
    assert max(seen(1000, 2) for _ in range(3)) == 2


def test_the_runtime_that_torch_was_linked_with_comes_before_one_that_looks_like_it(
    sources: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "torch" / "lib"
    folder.mkdir(parents=True)
    built = build(tmp_path, sources=sources)  # a library without OpenMP
    ctypes.CDLL(str(shutil.copy(built.path, folder / "libgomp-other.so")))
    fresh = ctypes.CDLL(str(shutil.copy(native_library().path, tmp_path / "fresh.so")))
    assert fresh.ds_cp_threads_seen(ctypes.c_int64(200), ctypes.c_int64(1)) == 1


def test_nobody_else_may_change_the_library(tmp_path: Path) -> None:
    """Under a umask that hides nothing: it is code that every rank loads."""
    made = tmp_path / "made.so"
    made.write_bytes(b"x")
    before = os.umask(0)
    try:
        _put(made, tmp_path / "library.so")
    finally:
        os.umask(before)
    assert (tmp_path / "library.so").stat().st_mode & 0o777 == 0o755
