"""The ``ds-cp`` command, one file a verb."""

from __future__ import annotations

from ds_cp.cli.main import run

__all__ = ["run"]
