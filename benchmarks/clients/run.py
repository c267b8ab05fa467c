"""The clients, and how the script of one runs against a server."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clients.proxy import Proxy, Sent
from benchmarks.environments import environment

SCRIPTS = Path(__file__).parent.absolute() / "scripts"
CLIENT_S = 900  # seconds of one client
# Headers that every HTTP client sends, and those that carry the body and the key.
COMMON = frozenset(
    "host accept accept-encoding connection content-type content-length authorization "
    "user-agent x-api-key".split()
)


@dataclass(frozen=True)
class Client:
    """A client: what pip installs, the package whose version the table shows, its script."""

    name: str
    packages: tuple[str, ...]
    shown: str
    script: str


CLIENTS = (
    Client("openai", ("openai",), "openai", "openai_sdk.py"),
    Client("openai-2", ("openai==2.54.*",), "openai", "openai_sdk.py"),
    Client("anthropic", ("anthropic",), "anthropic", "anthropic_sdk.py"),
    Client(
        "langchain-openai",
        ("langchain", "langchain-openai"),
        "langchain-openai",
        "langchain_chat.py",
    ),
    Client("llm", ("llm",), "llm", "llm_models.py"),
    Client("litellm", ("litellm",), "litellm", "litellm_calls.py"),
    Client("instructor", ("instructor",), "instructor", "instructor_calls.py"),
)


def python_of(client: Client, install_s: float) -> Path:
    """The python of the client's environment, which is made where it is missing. Raises what
    ``environment`` raises."""
    return environment(client.name, client.packages, install_s=install_s)


def own_python(client: Client) -> Path | None:
    """This process's python where the client is installed beside it."""
    here = all(importlib.util.find_spec(name.replace("-", "_")) for name in client.packages)
    return Path(sys.executable) if here else None


def run(
    client: Client, python: Path, base: str, model: str, key: str, proxy: Proxy,
    names: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The results of a client: of the checks that are named, or of all. Raises ``RuntimeError``
    with the end of what the script printed if it did not come to its last line, and
    ``subprocess.TimeoutExpired``."""
    with tempfile.TemporaryDirectory() as home:
        # A home of its own: clients keep settings, keys and logs there. Nothing asks the network.
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        env = keep | {"HOME": home, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(
            [str(python), str(SCRIPTS / client.script), base, model, key, proxy.url, *names],
            env=env,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=CLIENT_S,
        )
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise RuntimeError(
            f"{client.name}: the script ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    prefix = Path(client.script).stem.split("_")[0]
    plain = [sent for sent in proxy.sent if sent.label in (f"{prefix}-chat", f"{prefix}-stream")]
    proxy.forget()
    return {
        "name": client.name,
        "version": found["versions"][client.shown],
        "versions": found["versions"],
        "rows": found["rows"],
        "sent": [told(sent) for sent in plain],
    }


def told(sent: Sent) -> dict[str, Any]:
    """A recorded request for the table: names of fields and headers, no values."""
    return {
        "method": sent.method,
        "path": sent.path,
        "fields": sorted(sent.body) if isinstance(sent.body, dict) else [],
        "headers": sorted(name for name in sent.headers if name not in COMMON),
        "agent": sent.headers.get("user-agent", ""),
    }
