"""Where the ranks are: hosts, the cp x tp grid, and what the launcher says."""

from __future__ import annotations

from ds_cp.topology.hosts import Grid, Topology, rank_text, resolve_grid
from ds_cp.topology.job import Job, detect, open_store_socket, peek_rank

__all__ = [
    "Grid",
    "Job",
    "Topology",
    "detect",
    "open_store_socket",
    "peek_rank",
    "rank_text",
    "resolve_grid",
]
