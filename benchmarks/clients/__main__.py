"""Clients of OpenAI's and Anthropic's protocols against a running server, as a table.

Each client has an environment of its own under .cache/environments, made by pip on the first run.
Without ``--base-url`` the small model is served on four ranks, with a key.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.clients.proxy import Proxy
from benchmarks.clients.report import page, write
from benchmarks.clients.run import CLIENTS, python_of, run
from benchmarks.common import RESULTS, commit, finish, machine, parser
from benchmarks.environments import INSTALL_S
from benchmarks.server import serving

PAGE = Path("docs/clients.md")
KEY = "key-of-the-clients"
LENGTH = 1024  # tokens of the model, so that a prompt can be too long without taking long
RANKS = 4


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    chosen = [client for client in CLIENTS if not args.only or client.name in args.only]
    pythons = {client.name: python_of(client, INSTALL_S) for client in chosen}
    facts = machine() | {"commit": commit()}
    with _server(args) as (base, key):
        facts |= {"model": _model_of(base, key), "ranks": args.ranks}
        with Proxy(base) as proxy:
            results = [
                run(client, pythons[client.name], base, facts["model"], key, proxy)
                | {"taken": f"{facts['date']}, commit {facts['commit']}"}
                for client in chosen
            ]
    failed = [
        f"{result['name']}: {row['check']}: {row['detail']}"
        for result in results
        for row in result["rows"]
        if row["result"] == "failed"
    ]
    out = None if args.check else RESULTS / "clients.json"
    if out:
        results = _beside_earlier(results, out)
        write(PAGE, page(results, facts))
    finish(facts | {"failed": len(failed), "clients": results}, out)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--base-url", help="a running server, without /v1")
    arguments.add_argument("--api-key", default=KEY, help="its key")
    arguments.add_argument("--ranks", type=int, default=RANKS, help="of the server it starts")
    arguments.add_argument("--check", action="store_true", help="write nothing")
    arguments.add_argument(
        "--only",
        nargs="+",
        choices=[client.name for client in CLIENTS],
        help="these clients; the columns of the others stay as they are",
    )
    return arguments.parse_args(argv)


def _beside_earlier(results: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """The new columns, and those of ``file`` for clients that were not run now."""
    earlier = json.loads(file.read_text())["clients"] if file.exists() else []
    known = {result["name"]: result for result in [*earlier, *results]}
    return [known[client.name] for client in CLIENTS if client.name in known]


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if args.base_url:
        yield args.base_url.rstrip("/"), args.api_key
        return
    with serving(args.ranks, max_model_len=LENGTH, server={"api_key": KEY}) as (url, _):
        yield url, KEY


def _model_of(base: str, key: str) -> str:
    request = urllib.request.Request(
        f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
