"""KV blocks with homes on ranks of different size: plain integers, no torch.

python examples/allocator.py
"""

from __future__ import annotations

from ds_cp.kv import BlockAllocator, OutOfBlocksError, SequenceTable

allocator = BlockAllocator([4, 8], block_size=64)  # 4 blocks on rank 0, 8 on rank 1
print(f"{allocator.capacity_tokens} tokens in all")

homes = [(0, block) for block in allocator.allocate(0, 4)]  # rank 0 is full now
try:
    allocator.allocate(0, 1)
except OutOfBlocksError as err:
    print(err)
homes += [(1, block) for block in allocator.allocate(1, 1)]  # the sequence spills

table = SequenceTable(block_size=64)
table.append(homes, 300)
print(f"token 10 is at {table.slot(10)}, token 299 at {table.slot(299)}, ranks {table.span}")

allocator.release(homes)
print(f"free blocks: {allocator.available()}")
