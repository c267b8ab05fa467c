"""One step, as plain integers: what rank 0 decides and every rank derives its shapes and messages
from.

Typed and bounded on the wire (msgspec), never pickled. No torch here.
"""

from __future__ import annotations

import msgspec

from ds_cp.layout import Runs, tail, total

Extents = tuple[tuple[int, int], ...]


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """One rank's part in one request's step.

    ``q_runs``: positions of the new tokens that this rank owns (it alone runs the layers on them);
    ``k_runs``: positions of all tokens whose KV has its home here, the new ones last, in storage
    order; ``extents``: their slots, as (first slot, length); ``new``: how many of them are new.
    """

    rank: int
    q_runs: Runs
    k_runs: Runs
    extents: Extents
    new: int

    @property
    def new_home_runs(self) -> Runs:
        """Positions of the new tokens whose home is this rank."""
        return tail(self.k_runs, self.new)

    @property
    def new_extents(self) -> Extents:
        """Their slots."""
        return tail(self.extents, self.new)


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How to choose the next token. ``seed`` and ``index`` name the random number to use, so that a
    request's stream depends on nothing else. ``banned``: ids that may not be chosen in this
    step."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    index: int
    logprobs: int  # -1: none wanted
    logit_bias: tuple[tuple[int, float], ...]
    banned: tuple[int, ...]


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One request in one step: new tokens at positions ``start ..``, and where everything is."""

    request: int
    mode: str
    ring_pass: str
    start: int
    tokens: tuple[int, ...]
    shards: tuple[Shard, ...]
    sampling: Sampling | None  # None: a chunk that is not the prompt's last

    def shard(self, rank: int) -> Shard | None:
        """Rank's part, or None when it has none."""
        for shard in self.shards:
            if shard.rank == rank:
                return shard
        return None

    @property
    def last_owner(self) -> int:
        """The rank that owns the last new token, and so samples."""
        last = self.start + len(self.tokens) - 1
        for shard in self.shards:
            if any(s <= last < s + n for s, n in shard.q_runs):
                return shard.rank
        raise ValueError(f"request {self.request}: nobody owns position {last}")

    @property
    def ships(self) -> bool:
        """Whether some new token's home is not its owner, so that its KV has to travel once."""
        return any(s.q_runs != s.new_home_runs for s in self.shards)


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """What all ranks do next. ``kind``: "run", "idle" (a sign of life) or "stop"."""

    step: int
    kind: str
    items: tuple[Item, ...] = ()


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """The token chosen for a request, its log-probability and the most likely ones, best first.

    ``token`` is -1 when the logits were not finite; the request then ends with an error.
    """

    request: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StepPlan)


def encode_plan(plan: StepPlan) -> bytes:
    """The plan as msgpack."""
    return _encoder.encode(plan)


def decode_plan(payload: bytes) -> StepPlan:
    """The plan from msgpack; ``msgspec.ValidationError`` when it is not one."""
    return _decoder.decode(payload)


def check_item(item: Item) -> None:
    """Assert what every plan must satisfy: each new token one owner and one home, slots as
    tokens."""
    new = len(item.tokens)
    want = list(range(item.start, item.start + new))
    owned = sorted(p for s in item.shards for a, n in s.q_runs for p in range(a, a + n))
    homed = sorted(p for s in item.shards for a, n in s.new_home_runs for p in range(a, a + n))
    assert owned == want, f"request {item.request}: owners cover {len(owned)} of {new} new tokens"
    assert homed == want, f"request {item.request}: homes cover {len(homed)} of {new} new tokens"
    stored = sum(total(s.k_runs) for s in item.shards)
    assert stored == item.start + new, f"request {item.request}: {stored} tokens stored"
    for shard in item.shards:
        assert total(shard.k_runs) == total(shard.extents)
