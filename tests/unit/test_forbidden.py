"""What no file of ds_cp does, found in its syntax tree: how others were taken over.

``test_layering.py`` has the rest of the gate: pickle, eval, ``torch.load``, objects in collectives,
``trust_remote_code``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.unit.test_layering import dotted, imports, sources, within

# The server answers; only what a user starts as a client asks. And only the hub's files of a model
# that the user names are fetched, before anything listens.
CLIENTS = ("client/", "cli/")
ASKS_OTHERS = ("httpx", "requests", "urllib.request", "urllib3", "aiohttp", "http.client", "ftplib",
               "smtplib", "xmlrpc", "websockets", "zmq", "grpc")  # fmt: skip
HUB = ("model/hub.py", "model/data_only.py")
# Reads from or writes to disk in ways that run code or that others can foresee.
UNSAFE_CALLS = {
    "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load", "numpy.load",
    "np.load", "torch.save", "torch.hub.load", "joblib.load", "ctypes.pythonapi",
    "builtins.compile", "importlib.util.decode_source", "hashlib.md5", "hashlib.sha1",
    "deepspeed.init_inference", "deepspeed.initialize", "jinja2.Environment", "jinja2.Template",
}  # fmt: skip
NOT_TRUE = {"shell", "allow_pickle"}
NOT_FALSE = {"weights_only", "verify", "check_hostname"}
# Where the wildcard addresses are named: none of them binds to one by itself.
WILDCARDS = {
    "topology/net.py": "what a wildcard socket is reached by on its own host",
    "config/addresses.py": "which hosts a server on the wildcard answers",
}
WILDCARD = re.compile(r"0\.0\.0\.0|::|\*")


def problems(file: str, tree: ast.Module) -> Iterator[str]:
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for line, name in imports(file, tree):
        if any(within(name, module) for module in ASKS_OTHERS) and not file.startswith(CLIENTS):
            yield f"{line}: imports {name}; only {' and '.join(CLIENTS)} ask others"
        if within(name, "huggingface_hub") and file not in HUB:
            yield f"{line}: imports {name}; only {' and '.join(HUB)} may"
        if name in UNSAFE_CALLS:
            yield f"{line}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in UNSAFE_CALLS:
            yield f"{node.lineno}: uses {dotted(node)}"
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if node.arg in NOT_TRUE and node.value.value is not False:
                yield f"{node.value.lineno}: {node.arg}={node.value.value}"
            if node.arg in NOT_FALSE and node.value.value is False:
                yield f"{node.value.lineno}: {node.arg}=False"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if WILDCARD.fullmatch(node.value) and node.value != "*" and file not in WILDCARDS:
                if id(node) not in documentation:
                    yield f"{node.lineno}: names the address {node.value}"


def test_no_file_does_what_took_others_over() -> None:
    found = [
        f"ds_cp/{file}:{problem}" for file, tree in sources() for problem in problems(file, tree)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import httpx",
        "from urllib.request import urlopen",
        "import zmq",
        "def f():\n    import requests",
        "from huggingface_hub import snapshot_download",
        "import os\nos.system('x')",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp",
        "np.load('x')",
        "run('x', shell=True)",
        "load('x', allow_pickle=True)",
        "load('x', weights_only=False)",
        "get('x', verify=False)",
        "sock.bind(('0.0.0.0', 1))",
        "host: str = '::'",
        "hashlib.md5(b'')",
    ],
)
def test_it_is_found(code: str) -> None:
    assert list(problems("worker/worker.py", ast.parse(code)))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("client/connection.py", "import httpx"),
        ("worker/worker.py", "import http\nimport urllib.parse"),
        ("worker/worker.py", "run(['x'], shell=False)\nx[::2]"),
        ("worker/worker.py", '"""0.0.0.0"""'),
    ],
)
def test_what_looks_like_it_is_fine(file: str, code: str) -> None:
    assert list(problems(file, ast.parse(code))) == []


@pytest.mark.parametrize("file", [*WILDCARDS, *HUB])
def test_every_exception_is_of_a_file(file: str) -> None:
    assert file in {name for name, _ in sources()}
