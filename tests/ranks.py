"""The short name of ``tests.helpers.ranks`` for scripts: ``from tests.ranks import run_ranks``."""

from tests.helpers.ranks import RankError, run_ranks, world_group

__all__ = ["RankError", "run_ranks", "world_group"]
