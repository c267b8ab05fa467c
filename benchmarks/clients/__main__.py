"""Clients of OpenAI's protocol against a running server, as a table.

Each client has an environment of its own under .cache/environments, made by pip on the first run.
Without ``--base-url`` the small model is served on one rank, with a key.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clients.proxy import Proxy, Sent
from benchmarks.clients.report import page, write
from benchmarks.common import RESULTS, commit, finish, machine, parser
from benchmarks.environments import environment
from benchmarks.server import serving

SCRIPTS = Path(__file__).parent / "scripts"
PAGE = Path("docs/clients.md")
KEY = "key-of-the-clients"
LENGTH = 1024  # tokens of the model, so that a prompt can be too long without taking long
CLIENT_S = 900  # seconds of one client
# Headers that every HTTP client sends, and those that carry the body and the key.
COMMON = frozenset(
    "host accept accept-encoding connection content-type content-length authorization "
    "user-agent".split()
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
    Client("langchain-openai", ("langchain-openai",), "langchain-openai", "langchain_chat.py"),
    Client("llm", ("llm",), "llm", "llm_models.py"),
    Client("litellm", ("litellm",), "litellm", "litellm_calls.py"),
    Client("instructor", ("instructor",), "instructor", "instructor_calls.py"),
)


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    chosen = [client for client in CLIENTS if not args.only or client.name in args.only]
    pythons = {client.name: environment(client.name, client.packages) for client in chosen}
    with _server(args) as (base, key):
        model = _model_of(base, key)
        with Proxy(base) as proxy:
            results = [
                _run(client, pythons[client.name], base, model, key, proxy) for client in chosen
            ]
    facts = machine() | {"commit": commit(), "model": model}
    if not (args.only or args.check):
        write(PAGE, page(results, facts))
    out = None if args.only or args.check else RESULTS / "clients.json"
    failed = [
        f"{result['name']}: {row['check']}: {row['detail']}"
        for result in results
        for row in result["rows"]
        if row["result"] == "failed"
    ]
    finish(facts | {"failed": len(failed), "clients": results}, out)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--base-url", help="a running server, without /v1")
    arguments.add_argument("--api-key", default=KEY, help="its key")
    arguments.add_argument("--check", action="store_true", help="write nothing")
    arguments.add_argument(
        "--only",
        action="append",
        choices=[client.name for client in CLIENTS],
        help="one client; nothing is written then",
    )
    return arguments.parse_args(argv)


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if args.base_url:
        yield args.base_url.rstrip("/"), args.api_key
        return
    with serving(max_model_len=LENGTH, server={"api_key": KEY}) as (url, _):
        yield url, KEY


def _model_of(base: str, key: str) -> str:
    request = urllib.request.Request(
        f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def _run(
    client: Client, python: Path, base: str, model: str, key: str, proxy: Proxy
) -> dict[str, Any]:
    print(f"--- {client.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as home:
        # A home of its own: clients keep settings, keys and logs there. Nothing asks the network.
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        env = keep | {"HOME": home, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(
            [str(python), str(SCRIPTS / client.script), base, model, key, proxy.url],
            env=env,
            cwd=home,
            stdout=subprocess.PIPE,
            text=True,
            timeout=CLIENT_S,
        )
    if done.returncode:
        raise RuntimeError(f"{client.name}: the script ended with {done.returncode}")
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
