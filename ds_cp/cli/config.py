"""``ds-cp config`` and ``ds-cp version``."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from ds_cp.cli.output import put
from ds_cp.config import Config, config_schema, explain, load_config
from ds_cp.version import __version__

# Their versions are printed.
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "mpi4py", "flash-attn")


def config(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Print the schema, check files, or explain one."""
    if args.action == "schema":
        put(json.dumps(config_schema(), indent=None if args.json else 2))
        return 0
    for file in args.files:
        loaded = load_config(file)
        if args.json:
            found: dict[str, Any] = {"file": file, "ok": True}
            if args.action == "explain":
                found["config"] = _shown(loaded)
            put(json.dumps(found))
        else:
            put("\n".join(explain(loaded)) if args.action == "explain" else f"{file}: OK")
    return 0


def _shown(loaded: Config) -> dict[str, Any]:
    """Every key with its value; secrets are hidden."""
    plain = loaded.model_dump(mode="json", by_alias=True)
    if plain["server"]["api_key"] is not None:
        plain["server"]["api_key"] = "(hidden)"
    return plain


def installed_version(package: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Print the versions that matter."""
    found: dict[str, str | None] = {"ds_cp": __version__, "python": platform.python_version()}
    found |= {package: installed_version(package) for package in PACKAGES}
    if args.json:
        put(json.dumps(found))
    else:
        for name, text in found.items():
            put(f"{name} {text or 'not installed'}")
    return 0
