"""What a rank of ``run_ranks`` needs, loaded once in the fork server, and out of the collector's
sight: a collection in a rank would copy every page of it."""

from __future__ import annotations

from ds_cp.process import importing

with importing(for_good=True):
    import deepspeed  # noqa: F401
    import pytest  # noqa: F401

    import tests.helpers.engines
    import tests.helpers.ranks  # noqa: F401
