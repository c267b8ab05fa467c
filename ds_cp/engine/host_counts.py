"""What host memory holds and has done, for ``EngineStats``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ds_cp.scheduler.host_moves import HostMoves


def host_counts(host: HostMoves, away: Collection[int]) -> dict[str, Any]:
    """Its fields of ``EngineStats``; ``away``: ranks that are not here."""
    if not host.is_on:
        return {}
    tier = host.tier
    ranks = range(len(tier.slots_per_rank))
    return {
        "host_blocks_used": tuple(tier.num_used(rank) for rank in ranks),
        "host_blocks_total": tuple(0 if r in away else tier.num_usable(r) for r in ranks),
        "host_blocks_failed": tuple(host.failed),
        "host_blocks_spilled": tier.spilled,
        "host_blocks_restored": host.restored,
        "prefix_cache_host_hits": host.hits,
    }
