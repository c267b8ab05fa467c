"""KV as integers: who gets which block, and where a request's tokens live. Needs no torch."""

from __future__ import annotations

from ds_cp.kv.blocks import BlockAllocator, OutOfBlocksError
from ds_cp.kv.placement import POLICIES, fits, largest_request, place
from ds_cp.kv.table import SequenceTable, new_blocks_needed

__all__ = [
    "POLICIES",
    "BlockAllocator",
    "OutOfBlocksError",
    "SequenceTable",
    "fits",
    "largest_request",
    "new_blocks_needed",
    "place",
]
