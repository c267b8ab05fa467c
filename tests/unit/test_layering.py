"""The architecture, checked over the source: what each layer may import, and what none may use."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ds_cp"

LAYERS = {
    "errors": 0,
    "version": 0,
    "text": 0,
    "layout": 0,
    "cost": 0,
    "clock": 0,
    "log_stream": 0,
    "process": 0,
    "sandbox": 0,
    "frames": 0,
    "grammar": 0,
    "trace": 0,
    "facts": 1,
    "plan": 1,
    "sampling_params": 1,
    "outputs": 1,
    "config": 1,
    "link": 2,
    "sizing": 2,
    "topology": 2,
    "parsing": 0,
    "templates": 2,
    "native": 2,
    "journal": 2,
    "comm": 3,
    "attention": 4,
    "kv": 4,
    "model": 5,
    "scheduler": 6,
    "worker": 6,
    "startup": 7,
    "engine": 8,
    "api": 9,
    "client": 9,
    "batch": 10,
    "serve": 11,
    "cli": 12,
    "": 13,  # ds_cp/__init__.py: names for users, from anywhere
}
_TENSORS = {"attention", "comm"}
NOT_EVEN_BELOW = {  # lower layers that a layer does not know all the same
    "attention": {"facts", "grammar", "outputs", "plan", "sampling_params"},
    "kv": {"comm", "facts", "grammar", "outputs", "plan", "sampling_params", "topology"},
    "model": {"facts", "grammar", "outputs", "plan", "sampling_params"},
    "scheduler": _TENSORS | {"model", "worker"},
    "api": _TENSORS | {"kv", "model", "scheduler", "startup", "worker"},
    "client": _TENSORS | {"kv", "model", "scheduler", "startup", "worker"},
    "batch": _TENSORS | {"kv", "model", "scheduler", "startup", "worker"},
    "serve": _TENSORS | {"kv"},
    "cli": _TENSORS | {"kv", "scheduler", "worker"},
}
SIDEWAYS = {("kv", "attention"), ("outputs", "sampling_params")}  # attention knows no cache

ONLY_IN = {
    "matplotlib": ["sizing/picture.py"],
    "mpi4py": ["topology/mpi.py"],
    "deepspeed": ["comm/process_group.py"],
    "torch.distributed": ["comm/process_group.py"],
    "flash_attn": ["attention/kernels/dense.py"],
    "triton": [
        *(
            f"attention/kernels/triton_{part}.py"
            for part in ("decode", "kernel", "merge", "prefill", "tables", "tile")
        ),
        "model/triton_linear.py",
        "model/triton_norm.py",
    ],  # fmt: skip
    "transformers": ["model/"],
    "fastapi": ["api/"],
    "starlette": ["api/"],
    "uvicorn": ["api/"],
    "httptools": ["api/"],
    "prometheus_client": ["api/"],
    "httpx": ["client/", "cli/"],
    "rich": ["cli/"],
    "shtab": ["cli/completion.py"],
    "llguidance": ["grammar/"],
}
WITHOUT_TORCH = [
    "errors.py",
    "version.py",
    "text.py",
    "config/",
    "cost.py",
    "facts.py",
    "frames.py",
    "grammar/",
    "journal/",
    "layout.py",
    "link/",
    "log_stream.py",
    "native/",
    "outputs.py",
    "plan.py",
    "process.py",
    "sampling_params.py",
    "sandbox.py",
    "sizing/",
    "topology/",
    "parsing/",
    "templates/",
    "trace/",
    "model/__init__.py",
    "model/chat_template.py",
    "kv/__init__.py",
    "kv/blocks.py",
    "kv/free_list.py",
    "kv/host_tier.py",
    "kv/placement.py",
    "kv/prefix.py",
    "kv/table.py",
    "scheduler/",
    "worker/__init__.py",
    "worker/grammars.py",
    "worker/state.py",
    "startup/__init__.py",
    "startup/own_port.py",
    "startup/report.py",
    "startup/resources.py",
    "engine/__init__.py",
    "engine/core.py",
    "engine/detokenize.py",
    "engine/interface.py",
    "engine/kv_map.py",
    "engine/loop.py",
    "engine/observer.py",
    "engine/picture.py",
    "engine/request_picture.py",
    "api/",
    "batch/",
    "client/",
    "serve/__init__.py",
    "serve/announce.py",
    "serve/async_engine.py",
    "serve/channel.py",
    "serve/generations.py",
    "serve/grammar_checks.py",
    "serve/job_link.py",
    "serve/job_words.py",
    "serve/mailboxes.py",
    "serve/meeting_place.py",
    "serve/mending.py",
    "serve/orders.py",
    "serve/preparations.py",
    "serve/ready_facts.py",
    "serve/seat.py",
    "serve/supervisor.py",
    "serve/timed_link.py",
    "serve/worker_child.py",
    "serve/worker_link.py",
    "cli/",
]
READS_ENVIRONMENT = [
    "topology/job.py",
    "cli/",
    "serve/worker_child.py",
    "engine/llm.py",
    "native/__main__.py",
]
MAX_LINES = 350
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {
    name
    for kind in ("object_list", "object")
    for name in (f"broadcast_{kind}", f"all_gather_{kind}", f"gather_{kind}", f"scatter_{kind}")
} | {"scatter_object_list", "send_object_list", "recv_object_list"}


@cache
def sources() -> list[tuple[str, ast.Module]]:
    """Every file below ``ds_cp`` with its tree, read and parsed once."""
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
    return "" if first == "__init__" else first


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
            if within(name, "torch.distributed") and not file.startswith("comm/process_group.py"):
                found.append((node.lineno, f"uses {name}; only comm/process_group.py may"))
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


def at_import(file: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of ``modules`` that importing ``file`` imports: by statements at its top."""
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = set()
    for _, name in imports(file, ast.Module(top, [])):
        module = name if name in modules else name.rpartition(".")[0]
        if module in modules:
            found.add(module)
    return found


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; [] for none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if circle := walk(other, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := walk(module, []))), [])


def test_no_module_imports_itself_through_others() -> None:
    modules = {module_of(file) for file, _ in sources()}
    graph = {module_of(file): at_import(file, tree, modules) for file, tree in sources()}
    assert cycle_in(graph) == []
    assert sum(map(len, graph.values())) > 2 * len(graph)  # the graph is the package's


@pytest.mark.parametrize(
    ("graph", "circle"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
        ({"a": {"a"}}, ["a", "a"]),
    ],
)
def test_an_import_cycle_is_found(graph: dict[str, set[str]], circle: list[str]) -> None:
    assert cycle_in(graph) == circle


def test_a_file_has_one_job() -> None:
    """A module that does not fit in the head is two."""
    long = {}
    for file, _ in sources():
        lines = len((PACKAGE / file).read_text("utf-8").splitlines())
        if lines > MAX_LINES:
            long[file] = lines
    assert long == {}


# Imports module after module; prints the first that brings torch, and the module that imports it.
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
    assert {"scheduler/scheduler.py", "engine/core.py", "serve/supervisor.py"} <= set(files)
    assert torch_loaded_by([module_of(file) for file in files]) == ""
    said = torch_loaded_by(["ds_cp.kv", "ds_cp.attention.spec"])
    assert said.startswith("ds_cp.attention.spec loads torch by ") and "__init__.py" in said


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_every_name_of_the_list_is_of_a_file(name: str) -> None:
    assert any(file.startswith(name) for file, _ in sources())


@pytest.mark.parametrize(
    ("file", "code", "line"),
    [
        ("kv/table.py", "import json\nfrom ds_cp.plan import StepPlan", 2),
        ("attention/local.py", "def f():\n    from ds_cp.kv import pool", 2),
        ("attention/kernels/x.py", "from ...kv.blocks import Blocks", 1),
        ("errors.py", "from ds_cp import init_inference", 1),
        ("api/app.py", "from ds_cp.comm import ring", 1),
        ("api/answers/chat.py", "from ds_cp.scheduler.request import Request", 1),
        ("scheduler/pacing.py", "from ds_cp.worker.state import WorkerState", 1),
        ("engine/core.py", "import ds_cp.api.app", 1),
        ("newthing/x.py", "", 0),
    ],
)
def test_upward_import_is_found(file: str, code: str, line: int) -> None:
    assert len(found := layer_problems(file, ast.parse(code))) == 1
    assert found[0].startswith(f"ds_cp/{file}:{line}:" if line else f"ds_cp/{file}: newthing")


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("cli/serve.py", "from ds_cp.serve.supervisor import serve"),
        ("kv/pool.py", "from ds_cp.kv.blocks import Blocks"),
        ("model/wiring.py", "from ds_cp.attention.state import merge\nimport ds_cp.kv.pool"),
        ("__init__.py", "from ds_cp.engine.llm import init_inference"),
    ],
)
def test_downward_import_is_fine(file: str, code: str) -> None:
    assert layer_problems(file, ast.parse(code)) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("topology/job.py", "def f():\n    import mpi4py.MPI"),
        ("comm/ring.py", "from torch import distributed"),
        ("worker/worker.py", "import deepspeed.comm as dist"),
        ("attention/kernels/sdpa.py", "from flash_attn import flash_attn_func"),
        ("worker/worker.py", "from transformers import AutoModel"),
        ("cli/main.py", "from fastapi import FastAPI"),
        ("plan.py", "def f():\n    import torch.nn"),
        ("worker/state.py", "import torch"),
        ("scheduler/new.py", "import torch"),
        ("kv/free_list.py", "from torch import Tensor"),
        ("text.py", "from torch import Tensor"),
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
    assert use_problems("worker/worker.py", ast.parse(code))


def test_harmless_look_alikes_are_fine() -> None:
    code = "model.eval()\nf(trust_remote_code=False)\nsafetensors.torch.load_file('x')\n"
    assert use_problems("worker/worker.py", ast.parse(code)) == []
