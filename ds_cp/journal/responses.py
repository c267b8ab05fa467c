"""What a journal keeps of stored responses: the protocol's JSON, in records."""

from __future__ import annotations

import msgspec

RESPONSE, SAID = "response:", "said:"  # of the keys, before an id and a name
BACKGROUND = "background:"  # of the groups of requests, before a response's id


class SaidRecord(msgspec.Struct, tag="said", frozen=True):
    """What a response adds to its conversation. ``items``: JSON; ``before``: the name of what was
    said before; ``owner``: the digest of an API key."""

    items: bytes
    before: str | None = None
    owner: str | None = None


class ResponseRecord(msgspec.Struct, tag="response", frozen=True):
    """A response. ``body``: JSON, without its output where that is what it added to its
    conversation behind ``inputs`` items; ``said``: the name of that; ``asked``: the request of one
    that runs, as JSON, by ``client``."""

    body: bytes
    said: str
    inputs: int
    whole: bool
    asked: bytes | None = None
    client: str = ""


Record = SaidRecord | ResponseRecord
encode_record = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def decode_record(data: bytes) -> Record:
    """The record. Raises ``ValueError``."""
    record: Record = _decode(data)
    return record
