"""What start-up decided, as plain data that processes may exchange. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LinkFacts:
    """One class of link: one-way latency of 1 KiB in microseconds, rate of 2 MiB in 1e9 bytes/s.
    ``in_background``: its bytes move while a rank computes."""

    name: str
    latency_us: float
    gb_per_s: float
    in_background: bool = True


@dataclass(frozen=True)
class Facts:
    """The same on every rank. Sizes in tokens unless the name says bytes.

    ``notes``: lines on what start-up did not use, such as parts of the checkpoint.
    """

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
    num_q_heads: int  # of the whole model; heads and dim are the mean over layers, rounded
    num_kv_heads: int
    block_size: int
    blocks_per_rank: tuple[int, ...]  # one per cp rank
    bytes_per_token: int  # on one rank
    threads: int
    ranks_at_once: int  # world ranks of one host that can compute at the same time
    exactness: float  # largest relative logit difference to transformers in the check at start
    links: tuple[LinkFacts, ...]
    flops_per_s: float  # of a linear layer on rank 0, while all ranks compute
    weights: int  # parameters on one rank that a token passes: of experts, those it is routed to
    head_dim: int  # mean of keys' and values'
    notes: tuple[str, ...] = ()
    rounding: float = 0.0  # as exactness, of transformers' own sdpa attention to its eager one
    windows: tuple[tuple[int, int], ...] = ()  # (window, number of layers that have it)
    kv_reason: str = ""  # what decided rank 0's KV budget
    packed: bool = False  # whether the linear layers of this rank are
    layer_weights: int = 0  # of ``weights`` those of the layers alone; 0: not known
    stored_weights: int = 0  # those of the layers, with the experts that a token does not pass
    head_weights: int = 0  # parameters that turn a hidden state into logits
    bytes_per_s: float = 0.0  # of weights, by one row on rank 0, while all ranks read; 0: not known
    alone_bytes_per_s: float = 0.0  # the same while the others wait
    layer_s: float = 0.0  # seconds of a layer beside its work
    hop_s: float = 0.0  # seconds that a hop of a ring adds to that, the wire's latency and all
    fingerprint: tuple[str, ...] = ()  # digests of this rank's model, the tokenizer's last
    host_blocks_per_rank: tuple[int, ...] = ()  # that host memory holds, () for none anywhere
    host_gb_per_s: float = 0.0  # of KV between rank 0 and its host memory

    def with_tokenizer(self, end_tokens: Iterable[int], size: int | None) -> Facts:
        """These facts beside a tokenizer of ``size`` tokens (``None``: not known) that names
        ``end_tokens``: its end tokens end an answer too, and a note says which ids of it the model
        does not know."""
        notes = list(self.notes)
        ends = sorted({*self.eos_token_ids, *end_tokens})
        if outside := [i for i in ends if not 0 <= i < self.vocab_size]:
            notes.append(
                f"end tokens {', '.join(map(str, outside))} are ignored: "
                f"the model's vocabulary has {self.vocab_size} tokens"
            )
        if size is not None and size > self.vocab_size:
            notes.append(
                f"the tokenizer has {size} tokens, the model's vocabulary {self.vocab_size}: "
                "a prompt with a token beyond it is refused"
            )
        kept = tuple(i for i in ends if i not in outside)
        return replace(self, eos_token_ids=kept, notes=tuple(notes))
