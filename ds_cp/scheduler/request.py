"""One request as the scheduler sees it. Integers and words only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import overload

from ds_cp.clock import steady_time
from ds_cp.kv.prefix import PrefixKeys
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home
from ds_cp.outputs import RequestMetrics
from ds_cp.sampling_params import SamplingParams
from ds_cp.scheduler.reasons import ModeReason, SpanReason


@dataclass(frozen=True, slots=True)
class KnownTokens(Sequence[int]):
    """``prompt`` followed by ``output``, without a copy of either: the answers to one prompt share
    it, and a prompt may have millions of tokens."""

    prompt: tuple[int, ...]
    output: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        length = len(self.prompt)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if stop <= length and step == 1:
                return self.prompt[start:stop]
            return [self[i] for i in range(start, stop, step)]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"token {index} of {len(self)}")
        return self.prompt[index] if index < length else self.output[index - length]

    def __iter__(self) -> Iterator[int]:
        return chain(self.prompt, self.output)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an attempt to start depended on that found no room: while a later one depends on no
    more, it need not look up the request's beginning, which may be long, to find none either.

    ``room``: blocks that each rank could allocate; ``next_key``: of the first block of its prefix
    that was not in the index; ``copies``: second copies ever entered there; ``reuses``: cached
    blocks that ever came into use again (they are room no more, but those of its prefix never were
    any for it); ``tokens``: those of the request; ``closed``: ranks being drained; ``busy``:
    whether other requests wanted ranks.
    """

    room: tuple[int, ...]
    next_key: bytes | None
    copies: int
    reuses: int
    tokens: int
    closed: int
    busy: bool

    def follows_from(self, old: Refusal) -> bool:
        """Whether ``old`` was refused under conditions at least as good, ``next_key`` apart: blocks
        evicted since then only take away."""
        same = (self.copies, self.reuses, self.tokens, self.closed, self.busy) == (
            old.copies, old.reuses, old.tokens, old.closed, old.busy,
        )  # fmt: skip
        return same and all(now <= then for now, then in zip(self.room, old.room, strict=True))


@dataclass(eq=False, slots=True)
class Request:
    """``number`` names it in plans; ``request_id`` to the caller. ``max_tokens`` is resolved (never
    None). ``siblings``: other answers to the same prompt that start when it has been computed.

    While it runs: ``table``, where its KV is; ``reserved``, blocks per rank for the rest of the
    prompt; ``moving``, for the index of each block that is to move, (its home, its next home, which
    is reserved); ``restoring``, for the index of each block whose content has yet to come back from
    the host, its place there; ``workers``, the ranks that compute it; ``in_flight``, tokens that
    are being drawn and whose values rank 0 does not know yet; ``shares_tail``, whether another
    request may hold its last block too, so that it must be copied before it is written.
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
    grammar: str = ""  # of ``params.structured_outputs``, as ranks compile it
    client: str = ""  # who sent it
    turn: int = 0  # among all clients, see ``fairness.Turns``
    siblings: list[Request] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    table: SequenceTable | None = None
    reserved: dict[int, list[int]] = field(default_factory=dict)
    moving: dict[int, tuple[Home, Home]] = field(default_factory=dict)
    restoring: dict[int, Home] = field(default_factory=dict)
    restored_step: int = 0  # the last one in which blocks came back for it
    workers: tuple[int, ...] = ()
    prefilling: bool = True
    in_flight: int = 0
    shares_tail: bool = False
    decode_key: tuple[str, str] | None = None  # mode and ring pass of its decode steps
    keys: PrefixKeys | None = None
    refusal: Refusal | None = None  # why it could not start when that was last tried
    num_keyed: int = 0  # its first blocks, entered in the prefix index
    served: int = 0  # its last step in which decodes had to take turns
    num_notified: int = 0  # outputs that the ranks know, for penalties
    cached_tokens: int | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    arrival_time: float = field(default_factory=steady_time)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    modes: list[str] = field(default_factory=list)
    ranks_used: set[int] = field(default_factory=set)  # up to its last stop
    last_token_time: float | None = None
    num_preemptions: int = 0
    # Until it begins, as the forecast was without its correction; None: not to be learnt from.
    expected_wait_s: float | None = None
    granted: int = 0  # ``max_tokens`` when it was admitted, where ranks that went away cut that
    why_span: SpanReason | None = None  # of the ranks that it has now
    why_mode: ModeReason | None = None  # of its newest step

    @property
    def tokens(self) -> KnownTokens:
        """The known tokens: the prompt, then the output."""
        return KnownTokens(self.prompt, self.output)

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key of service: the lower priority number first, then the client's turn, then the
        older."""
        return self.priority, self.turn, self.number

    @property
    def num_tokens(self) -> int:
        """Known tokens, of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def max_need(self) -> int:
        """Tokens whose KV it may need: the last one drawn needs none."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is stored, or will be when the steps in flight are done."""
        return self.table.num_tokens if self.table else 0

    @property
    def held(self) -> list[Home]:
        """Blocks that it holds beside those of its table."""
        held = [(rank, block) for rank, blocks in self.reserved.items() for block in blocks]
        return [*held, *(target for _, target in self.moving.values())]

    def end_by(self, token: int, ends: Sequence[int]) -> tuple[str | None, int | None]:
        """Why the newest token, ``token``, is the last one, and the one that stopped it, if it did;
        ``ends``: the model's own end tokens."""
        params, length = self.params, len(self.output)
        if length > params.min_tokens:  # that many come before an end, as in vLLM
            if params.stop_token_ids and token in params.stop_token_ids:
                return "stop", token
            if token in ends and not params.ignore_eos:
                return "stop", None
        return ("length" if length >= self.max_tokens else None), None

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
