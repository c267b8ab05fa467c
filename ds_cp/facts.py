"""What start-up decided, as plain data that may cross a process border. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinkFacts:
    """One class of link: one-way latency in microseconds of 1 KiB, 1e9 bytes/s of 2 MiB."""

    name: str
    latency_us: float
    gb_per_s: float


@dataclass(frozen=True)
class Facts:
    """The same on every rank. Sizes in tokens unless the name says bytes."""

    hosts: tuple[str, ...]  # of every world rank
    cp_size: int
    tp_size: int
    device: str
    dtype: str
    kernel: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_q_heads: int  # of the whole model
    num_kv_heads: int
    block_size: int
    blocks_per_rank: tuple[int, ...]  # one per cp rank
    bytes_per_token: int  # on one rank
    threads: int
    ranks_at_once: int  # world ranks of one host that can compute at the same time
    exactness: float  # largest relative logit difference to transformers in the check at start
    links: tuple[LinkFacts, ...]
    flops_per_s: float  # of a linear layer on rank 0, while all ranks compute
    weights: int  # parameters on one rank that every token passes
    head_dim: int
