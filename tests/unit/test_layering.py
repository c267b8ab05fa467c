"""The architecture, checked over the source: who may import whom, and what nobody may use."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ds_cp"

LAYERS = {
    "errors": 0,
    "version": 0,
    "config": 0,
    "config_models": 0,
    "config_text": 0,
    "cost": 0,
    "layout": 0,
    "topology": 1,
    "comm": 2,
    "attention": 3,
    "kv": 3,
    "model": 4,
    "engine": 5,
    "serve": 6,
    "cli": 6,
    "": 7,  # ds_cp/__init__.py: names for users, from anywhere
}
NOT_EVEN_BELOW = {"serve": {"attention", "comm"}, "cli": {"attention", "comm"}}
SIDEWAYS = {("cli", "serve"), ("kv", "attention")}  # attention knows no cache

ONLY_IN = {
    "mpi4py": ["topology/mpi.py"],
    "deepspeed": ["comm/wire.py"],
    "torch.distributed": ["comm/wire.py"],
    "flash_attn": ["attention/kernels/flash.py"],
    "transformers": ["model/", "serve/agent.py"],
    "fastapi": ["serve/"],
    "starlette": ["serve/"],
    "uvicorn": ["serve/"],
    "prometheus_client": ["serve/"],
}
WITHOUT_TORCH = [
    "errors.py",
    "version.py",
    "config",
    "cost.py",
    "layout.py",
    "topology/",
    "kv/__init__.py",
    "kv/blocks.py",
    "kv/placement.py",
    "kv/prefix.py",
    "kv/runs.py",
    "kv/table.py",
    "engine/__init__.py",
    "engine/chunks.py",
    "engine/core.py",
    "engine/decisions.py",
    "engine/detokenize.py",
    "engine/handle.py",
    "engine/homes.py",
    "engine/loop.py",
    "engine/mirror.py",
    "engine/moving.py",
    "engine/pacing.py",
    "engine/params.py",
    "engine/plan.py",
    "engine/policy.py",
    "engine/process.py",
    "engine/request.py",
    "engine/scheduler.py",
    "engine/startup_facts.py",
    "engine/waiting.py",
    "serve/agent.py",
    "serve/app.py",
    "serve/async_engine.py",
    "serve/border.py",
    "cli",
]
READS_ENVIRONMENT = ["topology/job.py", "cli", "serve/agent.py", "engine/offline.py"]
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {
    name
    for kind in ("object_list", "object")
    for name in (f"broadcast_{kind}", f"all_gather_{kind}", f"gather_{kind}", f"scatter_{kind}")
} | {"scatter_object_list", "send_object_list", "recv_object_list"}


def sources() -> list[tuple[str, ast.Module]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(f.relative_to(PACKAGE).as_posix(), ast.parse(f.read_text("utf-8"))) for f in files]


def imports(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported dotted name with its line: at the top, in functions, for type checking."""
    folder = ["ds_cp", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = folder[: len(folder) - node.level + 1] + base
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def unit(parts: list[str]) -> str:
    """The layer's name of a file or module below ``ds_cp``."""
    first = parts[0] if parts else ""
    first = first.removesuffix(".py")
    if first == "__init__":
        return ""
    return "cli" if first.startswith("cli_") else first


def layer_problems(file: str, tree: ast.Module) -> list[str]:
    mine = unit(file.split("/"))
    if mine not in LAYERS:
        return [f"ds_cp/{file}: {mine} has no layer; add it to LAYERS"]
    found = []
    for line, name in imports(file, tree):
        if not within(name, "ds_cp"):
            continue
        parts = name.split(".")[1:]
        other = unit(parts) if parts and unit(parts) in LAYERS else ""
        fine = (
            other == mine
            or LAYERS[other] < LAYERS[mine]
            or (mine, other) in SIDEWAYS
            or LAYERS[mine] == LAYERS[other] == 0
        )
        if not fine or other in NOT_EVEN_BELOW.get(mine, ()):
            found.append(f"ds_cp/{file}:{line}: {mine} must not import {name}")
    return found


def owner_problems(file: str, tree: ast.Module) -> list[str]:
    found = []
    for line, name in imports(file, tree):
        for module, homes in ONLY_IN.items():
            if within(name, module) and not file.startswith(tuple(homes)):
                found.append(f"ds_cp/{file}:{line}: only {' and '.join(homes)} may import {module}")
        if within(name, "torch") and file.startswith(tuple(WITHOUT_TORCH)):
            found.append(f"ds_cp/{file}:{line}: imports {name}; this file is without torch")
    return found


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def use_problems(file: str, tree: ast.Module) -> list[str]:
    found = []
    for line, name in imports(file, tree):
        if name.split(".")[0] in FORBIDDEN_MODULES or name == "torch.load":
            found.append((line, f"imports {name}"))
        if name in ("os.environ", "os.getenv") and not file.startswith(tuple(READS_ENVIRONMENT)):
            found.append((line, "reads the environment"))
        if name.split(".")[-1] in FORBIDDEN_ATTRIBUTES:
            found.append((line, f"imports {name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append((node.lineno, f"global {', '.join(node.names)}"))
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append((node.lineno, f"uses {node.id}"))
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append((node.value.lineno, "trust_remote_code other than False"))
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            if name == "torch.load" or node.attr in FORBIDDEN_ATTRIBUTES:
                found.append((node.lineno, f"uses {name}"))
            if within(name, "torch.distributed") and not file.startswith("comm/wire.py"):
                found.append((node.lineno, f"uses {name}; only comm/wire.py may"))
            if name in ("os.environ", "os.getenv"):
                if not file.startswith(tuple(READS_ENVIRONMENT)):
                    found.append((node.lineno, "reads the environment"))
    return [f"ds_cp/{file}:{line}: {what}" for line, what in found]


CHECKS = [layer_problems, owner_problems, use_problems]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source_follows_the_architecture(check) -> None:
    found = [problem for file, tree in sources() for problem in check(file, tree)]
    assert not found, "\n" + "\n".join(found)


def module_of(file: str) -> str:
    return ".".join(["ds_cp", *file.removesuffix(".py").split("/")]).removesuffix(".__init__")


# Imports module after module and prints the first after which torch is there, with who asked.
LOADS_TORCH = """
import importlib, sys, traceback

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            stack = [f.filename for f in traceback.extract_stack() if "ds_cp" in f.filename]
            print(module, "loads torch by", " <- ".join(reversed(stack)))
            sys.exit()

sys.meta_path.insert(0, Watch())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def torch_loaded_by(modules: list[str]) -> str:
    """What a fresh interpreter that imports ``modules`` in order says of the first to load
    torch."""
    argv = [sys.executable, "-c", LOADS_TORCH, *modules]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_files_without_torch_do_not_load_it_through_others_either() -> None:
    """So the process that schedules and speaks HTTP starts at once and stays small."""
    files = [file for file, _ in sources() if file.startswith(tuple(WITHOUT_TORCH))]
    assert {"engine/scheduler.py", "engine/core.py", "serve/agent.py"} <= set(files)
    assert torch_loaded_by([module_of(file) for file in files]) == ""
    said = torch_loaded_by(["ds_cp.kv", "ds_cp.attention.spec"])
    assert said.startswith("ds_cp.attention.spec loads torch by ") and "__init__.py" in said


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_every_name_of_the_list_is_of_a_file(name: str) -> None:
    assert any(file.startswith(name) for file, _ in sources())


@pytest.mark.parametrize(
    ("file", "code", "line"),
    [
        ("kv/table.py", "import json\nfrom ds_cp.engine.plan import StepPlan", 2),
        ("attention/local.py", "def f():\n    from ds_cp.kv import pool", 2),
        ("attention/kernels/x.py", "from ...kv.blocks import Blocks", 1),
        ("errors.py", "from ds_cp import init_inference", 1),
        ("serve/app.py", "from ds_cp.comm import ring", 1),
        ("engine/engine.py", "import ds_cp.serve.app", 1),
        ("newthing/x.py", "", 0),
    ],
)
def test_upward_import_is_found(file: str, code: str, line: int) -> None:
    assert len(found := layer_problems(file, ast.parse(code))) == 1
    assert found[0].startswith(f"ds_cp/{file}:{line}:" if line else f"ds_cp/{file}: newthing")


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("cli_serve.py", "from ds_cp.serve.agent import serve"),
        ("kv/pool.py", "from ds_cp.kv.blocks import Blocks"),
        ("model/wiring.py", "from ds_cp.attention.state import merge\nimport ds_cp.kv.pool"),
        ("__init__.py", "from ds_cp.engine.offline import init_inference"),
    ],
)
def test_downward_import_is_fine(file: str, code: str) -> None:
    assert layer_problems(file, ast.parse(code)) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("topology/job.py", "def f():\n    import mpi4py.MPI"),
        ("comm/ring.py", "from torch import distributed"),
        ("engine/worker.py", "import deepspeed.comm as dist"),
        ("attention/kernels/sdpa.py", "from flash_attn import flash_attn_func"),
        ("engine/worker.py", "from transformers import AutoModel"),
        ("cli.py", "from fastapi import FastAPI"),
        ("engine/plan.py", "def f():\n    import torch.nn"),
        ("engine/mirror.py", "import torch"),
        ("kv/runs.py", "from torch import Tensor"),
        ("config_text.py", "from torch import Tensor"),
    ],
)
def test_foreign_package_in_the_wrong_file_is_found(file: str, code: str) -> None:
    assert owner_problems(file, ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('x = 1')",
        "torch.load('x')",
        "from torch import load",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "dist.broadcast_object_list([])",
        "dist.all_gather_object([], 1)",
        "import torch\ntorch.distributed.barrier()",
        "def f():\n    global x\n    x = 1",
        "import os\nos.environ['X']",
        "from os import getenv",
    ],
)
def test_forbidden_use_is_found(code: str) -> None:
    assert use_problems("engine/worker.py", ast.parse(code))


def test_harmless_look_alikes_are_fine() -> None:
    code = "model.eval()\nf(trust_remote_code=False)\nsafetensors.torch.load_file('x')\n"
    assert use_problems("engine/worker.py", ast.parse(code)) == []
