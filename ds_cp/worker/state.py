"""What every rank knows of the running requests, updated by the plans alone. No torch.

The scheduler's plans say what changes; applying them in order gives each rank the same block
tables, positions and owners, from which it derives what it has to do in the step. Token values are
known where they are needed: prompts on every rank, a drawn token on the rank that drew it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Blocks, Home, Runs, join, total
from ds_cp.plan import Begin, Chunk, Fork, Sampling, StepPlan

NO_TOKEN = -1  # in place of a token id that this rank does not know


@dataclass(eq=False, slots=True)
class RunningSequence:
    """One running request. ``tokens``: known to all ranks, the prompt first; never changed, and
    shared by all answers to a prompt. ``drawn``: the number of outputs drawn so far, the same on
    all ranks; ``sampler``: the rank that drew the last one, and ``last``: its value, on that rank.
    ``outputs``: values of the output as far as known here.
    """

    number: int
    tokens: tuple[int, ...]
    prompt_length: int
    table: SequenceTable
    sampling: Sampling
    drawn: int
    sampler: int = -1
    last: int = NO_TOKEN
    outputs: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens: ``tokens`` itself when no output is among them."""
        return self.tokens[: self.prompt_length]


@dataclass(frozen=True)
class Shard:
    """One rank's part in one request's step.

    ``q_runs``: positions of the new tokens that this rank owns (it alone runs the layers on them);
    ``blocks``: all blocks whose home is here, those of new tokens included; ``new_runs``: positions
    of the new tokens that are stored here.
    """

    rank: int
    q_runs: Runs
    blocks: Blocks
    new_runs: Runs

    @property
    def new(self) -> int:
        """How many new tokens are stored here."""
        return total(self.new_runs)


@dataclass(frozen=True)
class Item:
    """One request in one step that this rank takes part in: new tokens at positions ``start ..``
    and where everything is. ``draws``: the last of them gives the next token."""

    sequence: RunningSequence
    mode: str
    ring_pass: str
    start: int
    count: int
    shards: tuple[Shard, ...]
    draws: bool

    def shard(self, rank: int) -> Shard | None:
        """Rank's part, or None when it has none."""
        for shard in self.shards:
            if shard.rank == rank:
                return shard
        return None

    @property
    def routing(self) -> tuple[int, tuple[int, ...]]:
        """Of one new token: its owner, and the ranks that hold keys."""
        owner = next(shard.rank for shard in self.shards if shard.q_runs)
        return owner, tuple(shard.rank for shard in self.shards if shard.blocks)

    @property
    def ships(self) -> bool:
        """Whether some new token's home is not its owner, so that its KV has to travel once."""
        return any(s.q_runs != s.new_runs for s in self.shards)


@dataclass(frozen=True)
class Handoff:
    """A drawn token that the next step needs on another rank."""

    sequence: RunningSequence
    source: int
    target: int


class Draw(NamedTuple):
    """A token that is drawn in this step, on ``rank``; ``index`` counts the request's outputs."""

    sequence: RunningSequence
    rank: int
    index: int  # type: ignore[assignment]


@dataclass
class StepWork:
    """What a plan means for one rank.

    ``decodes``: requests that decode here, with KV on this rank only; ``items``: everything else
    that this rank has a part in. Of all ranks: ``draws``, in the order in which each rank draws;
    ``handoffs``; ``scored``, (sequence, first position, count, owner) of prompt tokens whose
    log-probabilities are wanted; ``ranks``, those with work in this step (tokens, a part in
    spanning attention, blocks to copy); each reports to rank 0; ``only_decodes``: no chunk of a
    prompt and no block to copy; ``whole``, by rank, (requests, keys) that decode there, with KV
    there only.
    """

    decodes: list[RunningSequence] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)
    handoffs: list[Handoff] = field(default_factory=list)
    scored: list[tuple[RunningSequence, int, int, int]] = field(default_factory=list)
    only_decodes: bool = True
    whole: dict[int, tuple[int, int]] = field(default_factory=dict)


class WorkerState:
    """The state of one rank's requests. ``apply`` gets every plan, in order."""

    def __init__(self, rank: int, block_size: int) -> None:
        self.rank = rank
        self.block_size = block_size
        self.sequences: dict[int, RunningSequence] = {}

    def apply(self, plan: StepPlan) -> StepWork:
        """Update the state by a plan and return what this rank has to do. Transfers change tables
        here; the caller moves the content, before anything else."""
        for number in plan.ended:
            self.sequences.pop(number, None)
        for number, index, token in plan.seen:
            sequence = self.sequences.get(number)
            if sequence is not None and index == len(sequence.outputs):
                sequence.outputs.append(token)
        work = StepWork(only_decodes=not (plan.chunks or plan.transfers))
        for transfer in plan.transfers:
            work.ranks.update((transfer.source[0], transfer.target[0]))
            for number in transfer.requests:
                sequence = self.sequences.get(number)
                if sequence is not None:  # or it was preempted after this was decided
                    sequence.table.replace(transfer.index, transfer.target)
        for begin in plan.begins:
            self._begin(begin)
        grown: dict[int, Home] = dict(plan.grown)
        for chunk in plan.chunks:
            self._chunk(chunk, work)
        for decodes in plan.decodes:
            for number in decodes.requests:
                home = grown.get(number) if grown else None
                self._decode(number, home, decodes.mode, decodes.ring_pass, work)
        for fork in plan.forks:
            self._fork(fork)
        return work

    def _begin(self, begin: Begin) -> None:
        table = SequenceTable(self.block_size, begin.homes, begin.computed)
        outputs = list(begin.tokens[begin.prompt_length :])
        self.sequences[begin.request] = RunningSequence(
            begin.request, begin.tokens, begin.prompt_length, table, begin.sampling,
            len(outputs), outputs=outputs,
        )  # fmt: skip

    def _fork(self, fork: Fork) -> None:
        parent = self.sequences[fork.parent]
        known = parent.prompt_length - 1
        homes = parent.table.homes[: -(-known // self.block_size)]
        sampling, grammar = fork.sampling, parent.sampling.grammar
        if grammar:
            sampling = msgspec.structs.replace(sampling, grammar=grammar)
        self.sequences[fork.request] = RunningSequence(
            fork.request, parent.prompt, parent.prompt_length,
            SequenceTable(self.block_size, homes, known), sampling, 0,
        )  # fmt: skip

    def _chunk(self, chunk: Chunk, work: StepWork) -> None:
        sequence = self.sequences[chunk.request]
        table = sequence.table
        start, count = table.num_tokens, sum(total(runs) for _, runs in chunk.owners)
        table.append(chunk.homes, count)
        owners = dict(chunk.owners)
        ranks = sorted({*owners, *table.span})
        work.ranks.update(ranks)
        last_owner = _owner(chunk.owners, start + count - 1)
        if chunk.mode != "local" or self.rank in ranks:
            shards = tuple(self._shard(table, r, owners.get(r, ()), start) for r in ranks)
            work.items.append(
                Item(sequence, chunk.mode, chunk.ring_pass, start, count, shards, chunk.samples)
            )
        if sequence.sampling.prompt_logprobs >= 0:
            for rank, runs in chunk.owners:
                for first, length in runs:
                    # a row scores the token after it; rows of the prompt's last token score none
                    length = min(length, sequence.prompt_length - 1 - first)
                    if length > 0:
                        work.scored.append((sequence, first, length, rank))
        if chunk.samples:
            self._draw(sequence, last_owner, work)

    def _decode(
        self, number: int, home: Home | None, mode: str, ring_pass: str, work: StepWork
    ) -> None:
        sequence = self.sequences[number]
        table = sequence.table
        start = table.num_tokens
        if home is None:
            table.append_one()
        else:
            table.append((home,), 1)
        owner = table.homes[-1][0]
        # a token that all ranks know, of a prompt, needs no handing over
        if owner != sequence.sampler and start >= len(sequence.tokens):
            work.handoffs.append(Handoff(sequence, sequence.sampler, owner))
        if mode == "local":
            work.ranks.add(owner)
            rows, keys = work.whole.get(owner, (0, 0))
            work.whole[owner] = rows + 1, keys + table.num_tokens
            if owner == self.rank:
                work.decodes.append(sequence)
        else:
            new: Runs = ((start, 1),)
            shards = tuple(
                Shard(rank, mine := new if rank == owner else (), table.blocks_on(rank), mine)
                for rank in table.span
            )
            work.ranks.update(table.span)
            work.items.append(Item(sequence, mode, ring_pass, start, 1, shards, True))
        self._draw(sequence, owner, work)

    @staticmethod
    def _draw(sequence: RunningSequence, rank: int, work: StepWork) -> None:
        work.draws.append(Draw(sequence, rank, sequence.drawn))
        sequence.drawn += 1
        sequence.sampler = rank

    @staticmethod
    def _shard(table: SequenceTable, rank: int, q_runs: Runs, start: int) -> Shard:
        return Shard(rank, join(q_runs), table.blocks_on(rank), table.runs_on(rank, start))


def _owner(owners: Sequence[tuple[int, Runs]], position: int) -> int:
    for rank, runs in owners:
        if any(start <= position < start + length for start, length in runs):
            return rank
    raise ValueError(f"nobody owns position {position}")


def check_item(item: Item) -> None:
    """Assert what every step must satisfy: each new token one owner and one home, slots as
    tokens."""
    want = list(range(item.start, item.start + item.count))
    owned = sorted(p for s in item.shards for a, n in s.q_runs for p in range(a, a + n))
    homed = sorted(p for s in item.shards for a, n in s.new_runs for p in range(a, a + n))
    name = f"request {item.sequence.number}"
    assert owned == want, f"{name}: owners cover {len(owned)} of {item.count} new tokens"
    assert homed == want, f"{name}: homes cover {len(homed)} of {item.count} new tokens"
    stored = sum(s.blocks.num_keys for s in item.shards)
    assert stored == item.start + item.count, f"{name}: {stored} tokens stored"
