"""The locks name everything that an install takes, and nothing else gets in."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "locks"
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
EXTRAS = ("mpi", "serve", "test", "bench")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"locks_{name}", LOCKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = script("install")


def entries(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a lock with its hashes; anything but options of build is an error."""
    text = (LOCKS / name).read_text("utf-8")
    for entry in re.split(r"\n(?=\S)", text.strip()):
        if entry.startswith(("#", "--only-binary :all:", "--no-binary deepspeed")):
            continue
        first, *rest = entry.split("\\\n")
        assert all(HASH.fullmatch(line.strip()) for line in rest), entry
        yield Requirement(first), HASH.findall(entry)


NAMES = sorted(file.name for file in LOCKS.glob("*.txt"))
INSTALLED = ("build.txt", "packages.txt", "torch.txt", "model.txt")


def environment(python: str, machine: str) -> dict[str, str]:
    return {
        **default_environment(), "python_version": python, "python_full_version": f"{python}.1",
        "platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux",
        "os_name": "posix", "implementation_name": "cpython", "extra": "",
        "platform_python_implementation": "CPython",
    }  # type: ignore[dict-item]  # fmt: skip


def versions(python: str, machine: str, names: tuple[str, ...] = INSTALLED) -> dict[str, str]:
    """What the locks install there."""
    here, found = environment(python, machine), dict[str, str]()
    for name in names:
        for requirement, _ in entries(name):
            if requirement.marker is None or requirement.marker.evaluate(here):
                key = canonicalize_name(requirement.name)
                version = str(requirement.specifier).removeprefix("==")
                assert found.setdefault(key, version) == version, f"two versions of {key}"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_package_has_one_version_and_hashes(name: str) -> None:
    found = list(entries(name))
    assert found
    for requirement, hashes in found:
        assert requirement.url is None and not requirement.extras, requirement
        assert re.fullmatch(r"==[\w.+!-]+", str(requirement.specifier)), requirement
        assert hashes and len(set(hashes)) == len(hashes), requirement


@pytest.mark.parametrize("name", NAMES)
def test_no_lock_names_an_index(name: str) -> None:
    """Where packages come from is the user's to say; what they are is not."""
    text = (LOCKS / name).read_text("utf-8")
    assert not re.search(r"://|--index|--extra-index|--find-links|--trusted-host", text)


def wanted() -> list[Requirement]:
    """What setup.py asks for, with the extras of `make install`."""
    setup = (ROOT / "setup.py").read_text("utf-8")
    said: dict[str, Any] = {}
    whole = setup.replace("setup(\n", "said.update(\n").replace(
        "from setuptools import find_packages, setup", "from setuptools import find_packages"
    )
    exec(compile(whole, str(ROOT / "setup.py"), "exec"), {  # our own file, without its effects
        "__file__": str(ROOT / "setup.py"), "__name__": "setup", "said": said,
    })  # fmt: skip
    assert said["python_requires"] == f">={PYTHONS[0]}"
    extras = [line for extra in EXTRAS for line in said["extras_require"][extra]]
    return [Requirement(line) for line in [*said["install_requires"], *extras]]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("python", PYTHONS)
def test_they_satisfy_setup_and_constraints(python: str, machine: str) -> None:
    found, here = versions(python, machine), environment(python, machine)
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    constraints = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in [*wanted(), *constraints]:
        if requirement.marker is None or requirement.marker.evaluate(here):
            name = canonicalize_name(requirement.name)
            if name not in found and requirement in constraints:
                continue  # of an extra that make install leaves out
            assert name in found, f"{name} is not locked; run make lock"
            assert requirement.specifier.contains(found[name]), (requirement, found[name])


def test_they_are_closed() -> None:
    """Every dependency of what is installed here is locked in a version that fits: pip takes none
    of its own accord, so one that is missing would be missing for good."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = versions(python, os.uname().machine)
    todo = [(one, "ds_cp") for one in wanted()]
    done: set[tuple[str, str]] = set()
    while todo:
        requirement, asker = todo.pop()
        extras = ["", *sorted(requirement.extras)]
        here = environment(python, os.uname().machine)
        if requirement.marker is not None and not requirement.marker.evaluate(here):
            continue
        name = canonicalize_name(requirement.name)
        assert name in found, f"{asker} needs {requirement}: not locked; run make lock"
        assert requirement.specifier.contains(found[name], prereleases=True), (asker, requirement)
        for extra in extras:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            for line in metadata.requires(name) or []:
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate(here | {"extra": extra}):
                    inner.marker = None
                    todo.append((inner, name))
    assert len(done) > 80


def test_nothing_is_installed_past_the_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By any of the commands: each checks hashes, or installs these files and no dependency."""
    monkeypatch.setattr(install, "found_torch", lambda: ("2.13.0+cpu", cpu_hash()))
    found = list(install.commands("auto"))
    assert len(found) == 5 and found[-1][-2:] == ["-e", str(ROOT)]
    for command in found:
        assert {"--no-deps", "--no-build-isolation"} <= set(command), command
        assert ("--require-hashes" in command) == (command is not found[-1])
    for name in INSTALLED:
        assert any(str(LOCKS / name) in command for command in found) or name == "torch.txt"
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert not re.search(r"pip install", makefile)


def cpu_hash() -> str:
    [(_, hashes)] = entries("torch-cpu.txt")
    return hashes[0]


@pytest.mark.parametrize(
    ("version", "sha256", "lock"),
    [("2.13.0", "", "torch.txt"), ("2.13.0+cpu", "", "torch-cpu.txt")],
)
def test_the_build_of_torch_that_pip_would_take(
    version: str, sha256: str, lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = next(h for r, h in entries(lock) if r.name == "torch")[0]
    monkeypatch.setattr(install, "found_torch", lambda: (version, known))
    assert install.torch_commands("auto") == [install.locked(lock)]
    monkeypatch.setattr(install, "found_torch", lambda: (version, "0" * 64))
    with pytest.raises(install.RefusedError, match=f"{'0' * 64}.*{lock}.*TORCH=any"):
        install.torch_commands("auto")


def wheel(folder: Path, name: str, content: str = "x = 1\n", needs: str = "") -> Path:
    """A small wheel, made by hand."""
    info = f"{name}-1.0.dist-info"
    file = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}"
    with zipfile.ZipFile(file, "w") as out:
        out.writestr(f"{name}.py", content)
        out.writestr(f"{info}/METADATA", about)
        out.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        out.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return file


def test_a_changed_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the very command that installs: the tested file goes in, one with another byte in it
    does not, and nor does a dependency that no lock names."""
    index, target, lock = tmp_path / "index", tmp_path / "site", tmp_path / "lock.txt"
    index.mkdir()
    good = wheel(index, "dscp_probe", needs="Requires-Dist: dscp-stranger\n")
    wheel(index, "dscp_stranger")
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    lock.write_text(f"--only-binary :all:\ndscp-probe==1.0 \\\n    --hash=sha256:{digest}\n")
    monkeypatch.setattr(install, "HERE", tmp_path)
    command = [*install.locked("lock.txt"), "--target", str(target)]
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index),
           "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}  # fmt: skip

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    done = run()
    assert done.returncode == 0, done.stderr
    assert (target / "dscp_probe.py").exists() and not (target / "dscp_stranger.py").exists()
    content = good.read_bytes()
    place = content.index(b"x = 1")
    good.write_bytes(content[:place] + b"y" + content[place + 1 :])
    (target / "dscp_probe.py").unlink()
    done = run()
    assert done.returncode != 0 and "DO NOT MATCH" in done.stderr, done.stderr
    assert not (target / "dscp_probe.py").exists()


def test_what_could_not_be_audited_is_not_clean() -> None:
    audit = script("audit")
    flaw = {"id": "PYSEC-1", "fix_versions": ["2"], "aliases": ["CVE-1"]}
    report = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": []},
            {"name": "b", "version": "1", "vulns": [flaw]},
            {"name": "c", "skip_reason": "not there"},
        ]
    }
    assert audit.read_packages([report]) == (["b 1: PYSEC-1 CVE-1; fixed in 2"], ["c"], 3)
    one = {"test_id": "B602", "filename": "ds_cp/x.py", "line_number": 3, "issue_text": "a shell"}
    argued = one | {"test_id": "B104", "filename": "ds_cp/topology/net.py"}
    assert audit.read_code({"results": [one, argued]}) == ["ds_cp/x.py:3: B602 a shell"]
    for _, file in audit.ARGUED:
        assert (ROOT / file).is_file()
