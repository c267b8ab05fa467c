"""One request as the scheduler sees it. Integers and words only."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ds_cp.kv.prefix import PrefixKeys
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home
from ds_cp.outputs import RequestMetrics
from ds_cp.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class Request:
    """``number`` names it in plans; ``request_id`` to the caller. ``max_tokens`` is resolved (never
    None). ``siblings``: other answers to the same prompt that start when it has been computed.

    While it runs: ``table``, where its KV is; ``reserved``, blocks per rank for the rest of the
    prompt; ``moving``, for the index of each block that is to move, (its home, its next home, which
    is reserved); ``workers``, the ranks that compute it; ``in_flight``, tokens that are being drawn
    and whose values rank 0 does not know yet; ``shares_tail``, whether another request may hold its
    last block too, so that it must be copied before it is written.
    """

    number: int
    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    priority: int = 0
    salt: str = ""
    index: int = 0  # which of the n answers
    siblings: list[Request] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    table: SequenceTable | None = None
    reserved: dict[int, list[int]] = field(default_factory=dict)
    moving: dict[int, tuple[Home, Home]] = field(default_factory=dict)
    workers: tuple[int, ...] = ()
    prefilling: bool = True
    in_flight: int = 0
    shares_tail: bool = False
    decode_key: tuple[str, str] | None = None  # mode and ring pass of its decode steps
    keys: PrefixKeys | None = None
    num_keyed: int = 0  # its first blocks, entered in the prefix index
    served: int = 0  # its last step in which decodes had to take turns
    num_notified: int = 0  # outputs that the ranks know, for penalties
    cached_tokens: int | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    arrival_time: float = field(default_factory=time.time)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    modes: list[str] = field(default_factory=list)
    num_preemptions: int = 0
    tokens: list[int] = field(init=False)  # known ones, of prompt and output

    def __post_init__(self) -> None:
        self.tokens = [*self.prompt, *self.output]

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of service: the lower priority number first, then the older."""
        return self.priority, self.number

    @property
    def num_tokens(self) -> int:
        """Known tokens, of prompt and output."""
        return len(self.tokens)

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is stored, or will be when the steps in flight are done."""
        return self.table.num_tokens if self.table else 0

    @property
    def held(self) -> list[Home]:
        """Blocks that it holds beside those of its table."""
        held = [(rank, block) for rank, blocks in self.reserved.items() for block in blocks]
        return [*held, *(target for _, target in self.moving.values())]

    def metrics(self) -> RequestMetrics:
        """Times and modes so far."""
        return RequestMetrics(
            self.arrival_time,
            self.first_scheduled_time,
            self.first_token_time,
            self.finished_time,
            tuple(self.modes),
            self.num_preemptions,
            self.cached_tokens or 0,
        )
