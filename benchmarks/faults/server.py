"""The server that suffers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.faults.outside import SmallDisk
from tests.helpers.jobs import ROOT
from tests.helpers.tiny import make_tiny_model

INJECTED = ROOT / "benchmarks" / "faults" / "injected"  # what workers import in addition


def configure(folder: Path, disk: SmallDisk | None, args: argparse.Namespace) -> Path:
    """Write the server's config."""
    config: dict[str, Any] = {
        "model": str(make_tiny_model(folder / "model")),
        "dtype": "fp32",
        "threads_per_rank": 1,
        "kv_cache": {"tokens_per_rank": args.tokens, "block_size": 16},
        "server": {"port": 0, "served_model_name": "tiny"},
        "fault_tolerance": {"hang_s": args.hang_s, "max_restarts": 5, "min_ranks": 1},
    }
    if disk is not None:
        config["fault_tolerance"]["journal_dir"] = str(disk.folder / "journal")
        config["trace"] = {"file": str(disk.folder / "trace.json")}
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file
