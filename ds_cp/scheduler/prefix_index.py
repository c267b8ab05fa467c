"""The prefix cache's index: the blocks that hold a prompt's beginning, on which ranks. No torch."""

from __future__ import annotations

from ds_cp.kv.blocks import BlockAllocator
from ds_cp.kv.host_tier import HostTier
from ds_cp.kv.prefix import KEY_BYTES
from ds_cp.layout import Home
from ds_cp.scheduler.request import Request


class PrefixIndex:
    """Enters what requests compute, and finds it for others that begin the same way.

    A block is entered under its key (``PrefixKeys``); a second copy of it on another rank under
    that key with the rank's number. ``copies``: second copies that were ever entered. A block that
    the device gave away may be found on the host, under its key (``tier``; None without one).
    """

    def __init__(self, allocator: BlockAllocator, tier: HostTier | None) -> None:
        self._tier = tier
        self.copies = 0
        self.skipped_fresh = False  # a lookup ended at a block that this step computes
        self._allocator = allocator
        self._fresh: set[Home] = set()  # blocks whose content is computed in the step in the making

    def begin_step(self) -> None:
        """Start a new plan: blocks that earlier plans compute can be copied by it."""
        self._fresh.clear()

    def enter(self, request: Request) -> None:
        """Enter the full blocks of a request that are computed and whose tokens are known."""
        table, keys = request.table, request.keys
        if table is None or keys is None:
            return
        whole = min(table.num_tokens, request.num_tokens) // table.block_size
        if whole <= request.num_keyed:
            return
        names = keys.upto(request.tokens, whole)
        for index in range(request.num_keyed, whole):
            rank, _ = home = table.homes[index]
            first = self._allocator.find(names[index])
            self._fresh.add(home)
            if first is None:
                if self._allocator.put(names[index], home) and self._tier is not None:
                    self._tier.drop(names[index])
            elif first[0] != rank:  # a second copy, for requests that stay on this rank
                self.copies += self._allocator.put(_on_rank(names[index], rank), home)
        request.num_keyed = whole

    def find(self, request: Request, near: int | None = None) -> list[Home]:
        """Cached blocks that hold the request's first tokens, from the first on; places on the host
        where the device has none. Prefers copies on rank ``near``; a block of another rank ends the
        list there if it cannot be copied in this step."""
        found: list[Home] = []
        for name in self._keys(request):
            home = self._allocator.find(name)
            if near is not None and (home is None or home[0] != near):
                second = self._allocator.find(_on_rank(name, near))
                if second is not None and second[0] == near:  # it may have moved
                    home = second
                elif home in self._fresh:
                    self.skipped_fresh = True
                    break
            if home is None and self._tier is not None:
                home = self._tier.find(name)
            if home is None:
                break
            found.append(home)
        return found

    def next_key(self, request: Request) -> bytes | None:
        """The key of the first block of its prefix that no rank has; None when all are there. What
        is on the host takes a block to come back, and so is no reason to try again."""
        keys = self._keys(request)
        return next((key for key in keys if self._allocator.find(key) is None), None)

    def _keys(self, request: Request) -> list[bytes]:
        """The keys of blocks that it may share. The last token is computed for its logits, and all
        of them are when they are scored."""
        if request.keys is None or request.params.prompt_logprobs is not None:
            return []
        most = (request.num_tokens - 1) // self._allocator.block_size
        return request.keys.upto(request.tokens, most)


def is_second(name: bytes) -> bool:
    """Whether a name of the index is that of a second copy."""
    return len(name) != KEY_BYTES


def _on_rank(name: bytes, rank: int) -> bytes:
    return name + rank.to_bytes(4, "little")
