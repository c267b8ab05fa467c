"""KV as integers: which request has which block, and where its tokens are stored. Needs no
torch."""

from __future__ import annotations

from ds_cp.kv.blocks import BlockAllocator, OutOfBlocksError
from ds_cp.kv.placement import POLICIES, place, place_block
from ds_cp.kv.prefix import PrefixKeys
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home

__all__ = [
    "POLICIES",
    "BlockAllocator",
    "Home",
    "OutOfBlocksError",
    "PrefixKeys",
    "SequenceTable",
    "place",
    "place_block",
]
