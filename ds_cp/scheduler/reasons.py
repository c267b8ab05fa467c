"""Why a request runs as it does: a short typed reason for its ranks and for its mode. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(str, Enum):
    """A decision's reason. The value is its name for programs, ``text`` a sentence for people."""

    text: str

    def __new__(cls, value: str, text: str) -> Reason:
        """A member that is also the string ``value``."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member


class SpanReason(Reason):
    """Why a request was given one rank, or several."""

    LOCAL_SET = "local_set", "the config's mode is local"
    SPAN_SET = "span_set", "the config's mode spans all ranks"
    LONG = "long", "it is longer than local_threshold"
    SHORT = "short", "it is no longer than local_threshold, and one rank has room"
    BUSY = "busy", "other requests use the other ranks"
    NO_RATES = "no_rates", "one rank has room, and no link was measured"
    ONE_PAYS = "one_pays", "alone on one rank it is done soonest"
    MORE_PAYS = "more_pays", "spread over these ranks it is done soonest"
    PREFIX = "prefix", "its beginning is cached there"
    NO_ROOM = "no_room", "no single rank has room for it"
    GREW = "grew", "its rank was full, so it grew onto another"
    MOVED = "moved", "its blocks were moved"


class ModeReason(Reason):
    """Why a step of a request runs in its mode."""

    SET = "set", "the config sets the mode"
    ONE_RANK = "one_rank", "queries and keys are on one rank, so nothing travels"
    ONE_QUERY = "one_query", "one new token: its query travels, not the keys"
    HOSTS = "hosts", "several hosts: partial results are merged up the tree"
    PASS_SET = "pass_set", "the config sets what travels around the ring"
    UNEVEN = "uneven", "the ranks hold unequal shares, so keys travel to the queries"
    FIRST = "first", "nothing is stored yet, so keys travel with their queries"
    HIDES = "hides", "keys travel while attention is computed"
    KV_SMALLER = "kv_smaller", "the keys are the smaller message"
    Q_SMALLER = "q_smaller", "the queries are the smaller message"


@dataclass(frozen=True, slots=True)
class Choice:
    """How a step of a request runs: "local", "ring" or "tree"; what travels around a ring, "kv" or
    "q"; why."""

    mode: str
    ring_pass: str
    why: ModeReason

    @property
    def key(self) -> tuple[str, str]:
        """(mode, ring_pass), by which decodes of one step are put together."""
        return self.mode, self.ring_pass


@dataclass(frozen=True, slots=True)
class Width:
    """Over how many ranks a prompt should be spread, and why."""

    ranks: int
    why: SpanReason
