"""What requests may still have when ranks are away, or have come back. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from ds_cp.errors import CapacityError
from ds_cp.scheduler.block_manager import BlockManager
from ds_cp.scheduler.request import Request
from ds_cp.topology.hosts import rank_text


def fit_again(blocks: BlockManager, live: Iterable[Request]) -> list[Request]:
    """Once the ranks that are here have changed: an answer whose length was left to the server may
    be as long as there is room now, up to what it was admitted with. Returns the requests that can
    never end here, whose caller asked for more."""
    largest, beyond = blocks.largest_tokens, []
    for request in live:
        for answer in (request, *request.siblings):
            if answer.params.max_tokens is None:
                answer.granted = answer.granted or answer.max_tokens
                answer.max_tokens = min(answer.granted, largest + 1 - len(answer.prompt))
        if request.max_need > largest or request.max_tokens <= len(request.output):
            beyond.append(request)
    return beyond


def refusal(blocks: BlockManager, request: Request) -> CapacityError:
    """Why a request is ended that was admitted when more ranks were here."""
    need, largest = request.max_need, blocks.largest_tokens
    if request.params.max_tokens is None:
        need = request.num_tokens
    away = sorted(blocks.away)
    who = f"rank {away[0]} is" if len(away) == 1 else f"ranks {rank_text(away)} are"
    return CapacityError(
        f"the request needs KV for {need} tokens, but {who} away, and the ranks that are left hold "
        f"{largest} for one request; send it again when they are back, or shorten it",
        need=need, have=sum(blocks.open_blocks) * blocks.allocator.block_size, largest=largest,
    )  # fmt: skip
