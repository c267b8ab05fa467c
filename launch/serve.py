"""``ds-cp serve`` for a launcher: deepspeed launch/serve.py --config FILE ..."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("ds_cp") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_cp.cli.main import run

if __name__ == "__main__":
    run(["serve", *sys.argv[1:]])
