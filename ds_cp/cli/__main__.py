"""``python -m ds_cp.cli``."""

from __future__ import annotations

from ds_cp.cli.main import run

if __name__ == "__main__":
    run()
