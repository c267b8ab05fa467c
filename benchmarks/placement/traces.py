"""Clusters and seeded traces: what arrives when, the same for every policy."""

from __future__ import annotations

import random
from dataclasses import dataclass

VOCAB = 49_152
BLOCK = 16  # tokens
SEEDS = (1, 2, 3, 4, 5)
STEPS = 960  # in which requests arrive
BLOCKS = 256  # of one rank, on average


@dataclass(frozen=True)
class Cell:
    """A cluster: the host of each rank, its blocks, and the prompt length above which a request
    spans all ranks although fewer would hold it (None: never)."""

    name: str
    hosts: str
    blocks: tuple[int, ...]
    threshold: int | None = None


def cells() -> tuple[Cell, ...]:
    even4, even8 = (BLOCKS,) * 4, (BLOCKS,) * 8
    odd4, odd8 = (512, 256, 128, 128), (512, 256, 128, 128, 512, 256, 128, 128)
    spread = BLOCKS * BLOCK // 2
    return (
        Cell("4 ranks, 1 host", "aaaa", even4),
        Cell("4 ranks, 2 hosts", "aabb", even4),
        Cell("8 ranks, 1 host", "aaaaaaaa", even8),
        Cell("8 ranks, 2 hosts", "aaaabbbb", even8),
        Cell("4 unequal ranks, 1 host", "aaaa", odd4),
        Cell("8 unequal ranks, 2 hosts", "aaaabbbb", odd8),
        Cell("4 ranks, 1 host, long prompts spread", "aaaa", even4, spread),
        Cell("8 ranks, 2 hosts, long prompts spread", "aaaabbbb", even8, spread),
    )


@dataclass(frozen=True)
class Session:
    """``opening`` tokens, then ``turns`` of (question, tokens of the answer); each turn comes
    ``pause`` steps after the answer before it."""

    number: int
    kind: str
    arrival: int
    opening: tuple[int, ...]
    turns: tuple[tuple[tuple[int, ...], int], ...]
    pause: int

    def token(self, turn: int, index: int) -> int:
        """The simulated model's tokens: the same whatever the placement."""
        return 1 + (self.number * 7919 + turn * 104_729 + 31 * index) % (VOCAB - 1)

    def prompt(self, turn: int) -> tuple[int, ...]:
        tokens = list(self.opening)
        for i in range(turn):
            tokens += self.turns[i][0]
            tokens += (self.token(i, index) for index in range(self.turns[i][1]))
        return (*tokens, *self.turns[turn][0])


def make_trace(ranks: int, blocks: int, steps: int, seed: int) -> list[Session]:
    """Sessions that arrive during ``steps`` steps, a third of the chats in a rush; as many per rank
    on every number of ranks, and prompts in proportion to ``blocks``, of one rank."""
    rng, capacity = random.Random(seed), blocks * BLOCK

    def text(low: int, high: int) -> tuple[int, ...]:
        length = max(1, rng.randint(low, high) * blocks // 256)
        return tuple(rng.randrange(1, VOCAB) for _ in range(length))

    systems = [text(n, n) for n in (96, 240, 400)]
    found: list[tuple[int, str, tuple[int, ...], list[tuple[tuple[int, ...], int]]]] = []
    for i in range(steps * ranks // 15):
        turns = [(text(16, 160), rng.randint(16, 128))]
        rush = steps * 3 // 5 + rng.randrange(steps // 16)
        at = rng.randrange(steps) if i % 3 else rush
        found.append((at, "chat", rng.choice(systems), turns))
    for _ in range(steps * ranks // 200):
        turns = [(text(16, 96), rng.randint(32, 128)) for _ in range(rng.randint(2, 5))]
        found.append((rng.randrange(steps), "conversation", rng.choice(systems), turns))
    for i in range(max(1, steps * ranks // 800)):
        document = text(int(1.2 * 4096), 3 * 4096)
        turns = [(text(16, 64), rng.randint(32, 128)) for _ in range(2)]
        found.append((i * 800 // ranks + rng.randrange(80), "document", document, turns))
    for i in range(2):
        found.append((steps // 3 * (i + 1), "too long", (1,) * capacity * ranks, [((1,), 8)]))
    found.sort(key=lambda f: f[0])
    return [
        Session(number, kind, arrival, opening, tuple(turns), rng.randint(4, 40))
        for number, (arrival, kind, opening, turns) in enumerate(found)
    ]


def make_filling(cell: Cell, seed: int) -> list[Session]:
    """A document of 1.5 ranks, then every other step a request of 1/64 to 3/16 of a rank, twice as
    many as fit; every answer goes on for as long as there is room."""
    rng, capacity = random.Random(seed), sum(cell.blocks) * BLOCK
    one = capacity // len(cell.blocks)
    lengths = [3 * one // 2]
    while sum(lengths) < 2 * capacity:
        lengths.append(rng.randint(one // 64, 3 * one // 16))
    limit = min(cell.blocks) * BLOCK  # so that mode local admits all but the document
    found = []
    for number, length in enumerate(lengths):
        question = tuple(rng.randrange(1, VOCAB) for _ in range(length))
        turns = ((question, max(limit - length, BLOCK)),)
        found.append(Session(number, "filling", 2 * number, (), turns, 0))
    return found
