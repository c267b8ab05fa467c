"""The plan of one step while it is being made, with the budgets that bound it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ds_cp.grammar.vocabulary import Vocabulary
from ds_cp.kv.table import SequenceTable
from ds_cp.layout import Home
from ds_cp.plan import Begin, Chunk, Decodes, Fork, Sampling, StepPlan, Transfer
from ds_cp.scheduler.chunking import Cut
from ds_cp.scheduler.pacing import ChunkPacer
from ds_cp.scheduler.request import Request

SCORED_ROWS = 256  # rows of logits of one step that score prompt tokens, over all ranks, at most


class Draft:
    """Collects what the next step does; ``plan`` makes the frozen plan of it.

    ``step``: its number. ``budget``: tokens that each rank may compute in it. ``pacer``: bounds
    the time that prompts may add; None for no such bound. ``vocabulary``: that the ranks do not
    have yet.
    """

    def __init__(
        self,
        step: int,
        budget: Sequence[int],
        pacer: ChunkPacer | None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.step = step
        self._vocabulary = vocabulary
        self.left = list(budget)  # tokens that each rank may still compute
        self.work = [0.0] * len(budget)  # on prompts, of each rank, in the pacer's unit
        self.pairs = [0.0] * len(budget)  # (query, key) of prompts that each rank attends a layer
        self.rows_left = SCORED_ROWS  # rows of logits that may still score prompt tokens
        self.decodes: dict[tuple[str, str], list[int]] = {}  # (mode, ring pass) -> requests
        self.transfers: list[Transfer] = []
        self.restores = False  # whether blocks come back from the host, which takes time
        self.grown: list[tuple[int, Home]] = []
        # (block, first place in it) of what is written; targets of transfers apart.
        self.written: list[tuple[Home, int]] = []
        self.reached: dict[int, int] = {}  # request -> its tokens that are computed afterwards
        self.begins: list[Begin] = []
        # At most, of the begins and the vocabulary as msgpack.
        self.begin_bytes = 0 if vocabulary is None else vocabulary.size
        self.forks: list[Fork] = []
        self.looking_back: list[Request] = []  # begun or forked, and their draws need old tokens
        self._pacer = pacer
        self._allowance = 0.0  # what ``work`` of a rank may become
        self._chunks: list[Chunk] = []

    @property
    def is_empty(self) -> bool:
        """Whether the step has nothing to compute or copy."""
        something = self.decodes or self._chunks or self.transfers or self.begins
        return not something and self._vocabulary is None

    @property
    def has_prompts(self) -> bool:
        """Whether the step computes prompt tokens."""
        return bool(self._chunks)

    @property
    def num_decodes(self) -> int:
        """Requests that decode in the step."""
        return sum(map(len, self.decodes.values()))

    @property
    def largest_work(self) -> float:
        """The most work on prompts that one rank has in this step."""
        return max(self.work)

    # --- prompts

    def allow_prompts(self) -> None:
        """Ask the pacer, once all decodes are entered, for how much work on prompts there is
        time."""
        if self._pacer is None:
            return
        self._allowance = self._pacer.allowance(self.num_decodes)
        if not self._allowance:
            self.left = [0] * len(self.left)

    def tokens_in_time(self, request: Request) -> int | None:
        """How many prompt tokens of ``request`` there is time for; None for no such bound."""
        if self._pacer is None:
            return None
        done = max(self.work[rank] for rank in request.workers)
        most = self._pacer.tokens(
            self._allowance - done, request.num_computed, len(request.workers)
        )
        return most if done else max(most, self._pacer.tuning.least_chunk_tokens)

    def work_of(self, share: float, tokens: int, past: int) -> float:
        """Work of a rank that computes ``share`` of ``tokens`` tokens after ``past`` ones."""
        if self._pacer is None or not tokens:
            return share
        return share / tokens * self._pacer.work(tokens, tokens, past)

    def tokens_of(self, work: float, past: int, ranks: int) -> int:
        """How many tokens after ``past`` ones are so much work on each of ``ranks`` ranks."""
        if self._pacer is None:
            return int(work * ranks)
        return self._pacer.tokens(work, past, ranks)

    def work_left(self) -> list[float]:
        """Work that each rank may still do."""
        if self._pacer is None:
            return [float(tokens) for tokens in self.left]
        return [max(self._allowance - work, 0.0) for work in self.work]

    def chunk(self, cut: Cut, past: int) -> None:
        """Enter a chunk that comes after ``past`` stored tokens, and charge the ranks for it."""
        self._chunks.append(cut.chunk)
        self.reached[cut.chunk.request] = past + sum(cut.owned)
        for rank, count in enumerate(cut.owned):
            self.pairs[rank] += cut.pairs[rank]
            self.left[rank] -= count
            if self._pacer is not None and count:
                self.work[rank] += self._pacer.work(count, sum(cut.owned), past)
                if self.work[rank] + 1.0 > self._allowance:
                    self.left[rank] = 0

    def writes(self, table: SequenceTable, past: int) -> None:
        """The tokens of ``table`` from ``past`` on are computed in this step."""
        index, place = divmod(past, table.block_size)
        for home in table.homes[index:]:
            self.written.append((home, place))
            place = 0

    def begin(self, request: Request, sampling: Sampling) -> None:
        """``request`` starts on the blocks that its table holds."""
        assert request.table is not None
        self.begins.append(Begin(
            request.number, (*request.prompt, *request.output), len(request.prompt),
            tuple(request.table.homes), request.table.num_tokens, sampling,
        ))  # fmt: skip
        if sampling.looks_back:
            self.looking_back.append(request)

    def fork(self, parent: Request, child: Request, sampling: Sampling) -> None:
        """``child`` starts as another answer to the prompt of ``parent``."""
        # All answers have one grammar, which is long: it travels once.
        without = msgspec.structs.replace(sampling, grammar="")
        self.forks.append(Fork(parent.number, child.number, without))
        if sampling.looks_back:
            self.looking_back.append(child)

    @property
    def new_blocks(self) -> list[Home]:
        """Blocks that the step computes into first."""
        return [*(home for _, home in self.grown), *(h for c in self._chunks for h in c.homes)]

    # --- the plan

    def plan(self, ended: Sequence[int], seen: Sequence[tuple[int, int, int]]) -> StepPlan:
        """The step as the ranks get it; ``ended`` and ``seen`` as in ``StepPlan``."""
        return StepPlan(
            self.step, tuple(ended), tuple(seen), tuple(self.transfers),
            tuple(self.begins), tuple(self.grown), tuple(self._chunks),
            tuple(Decodes(*key, tuple(numbers)) for key, numbers in self.decodes.items()),
            tuple(self.forks), self._vocabulary,
        )  # fmt: skip
