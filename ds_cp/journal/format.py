"""The bytes of a journal: a header, then frames of operations, each frame with its own checksum.

A frame is the unit that a file has or has not: its operations happened together. Each operation is
about a key: ``PUT`` begins it anew, ``ADD`` follows, ``DROP`` ends it. Operations are numbered, and
each names the one before it of its key, so that behind damage in the middle of a file nothing is
added to a beginning that is not its own.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from typing import NamedTuple

import msgspec

VERSION = 1
MAGIC = b"ds_cp journal\n"
# How a frame begins: no UTF-8 has the first byte, and no array of token ids has these in a row.
MARK = b"\xfe\xd5JR"
MAX_FRAME = 64 << 20  # bytes of a frame's operations
MAX_HEADER = 1 << 16  # bytes of what a header says
DIGEST = 16  # bytes of a checksum
_START = struct.Struct("<14sHI")  # magic, version, size of what follows
_FRAME = struct.Struct("<4sIQ")  # mark, size, number
FRAME_BYTES = _FRAME.size + DIGEST  # of a frame beside its operations


class Kind(IntEnum):
    """What an operation does to its key."""

    PUT = 0
    ADD = 1
    DROP = 2


class Op(msgspec.Struct, array_like=True, frozen=True):
    """One operation. ``number``: its own, of all of the journal; ``before``: of the one before it
    of its key, of a ``PUT`` its own; ``at``: seconds since the epoch."""

    kind: Kind
    key: str
    number: int
    before: int
    at: int
    data: bytes = b""


class Header(msgspec.Struct, frozen=True):
    """Whose journal it is. ``model``: digests of the model's parts, ``tokenizer``: of its files,
    ``config``: of what decides the tokens. ``secret``: the key of the frames' checksums, so that
    nothing that a client sends can look like a frame."""

    config: str
    model: tuple[str, ...]
    tokenizer: str
    secret: bytes


class FrameHead(NamedTuple):
    """What stands before a frame's operations. ``size``: their bytes."""

    size: int
    number: int


class NotAJournalError(ValueError):
    """A file does not begin as a journal does; the message says how."""


def encode_header(header: Header) -> bytes:
    """The bytes that a journal begins with."""
    body = msgspec.msgpack.encode(header)
    raw = _START.pack(MAGIC, VERSION, len(body)) + body
    return raw + hashlib.blake2b(raw, digest_size=DIGEST).digest()


def decode_header(raw: bytes) -> tuple[Header, int]:
    """The header at the beginning of ``raw``, and its bytes. Raises ``NotAJournalError``."""
    if len(raw) < _START.size:
        raise NotAJournalError(f"has {len(raw)} bytes, fewer than a header")
    magic, version, size = _START.unpack_from(raw)
    if magic != MAGIC:
        raise NotAJournalError("does not begin as a journal of ds_cp does")
    if version != VERSION:
        raise NotAJournalError(f"is of version {version}; this ds_cp reads version {VERSION}")
    end = _START.size + size
    if size > MAX_HEADER or len(raw) < end + DIGEST:
        raise NotAJournalError("has a damaged header")
    if hashlib.blake2b(raw[:end], digest_size=DIGEST).digest() != raw[end : end + DIGEST]:
        raise NotAJournalError("has a damaged header")
    try:
        header = msgspec.msgpack.decode(raw[_START.size : end], type=Header)
    except ValueError:
        raise NotAJournalError("has a header that this ds_cp does not know") from None
    return header, end + DIGEST


def encode_frame(ops: list[Op], number: int, secret: bytes) -> bytes:
    """Operations as a frame. Raises ``ValueError`` for more than ``MAX_FRAME`` bytes of them."""
    body = msgspec.msgpack.encode(ops)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a frame of {len(body)} bytes is above the limit {MAX_FRAME}")
    head = _FRAME.pack(MARK, len(body), number)
    return head + _digest(head, body, secret) + body


def decode_head(raw: bytes) -> FrameHead | None:
    """The first ``FRAME_BYTES`` of a frame; None for what is none."""
    if len(raw) < FRAME_BYTES:
        return None
    mark, size, number = _FRAME.unpack_from(raw)
    return FrameHead(size, number) if mark == MARK and size <= MAX_FRAME else None


def decode_frame(head: bytes, body: bytes, secret: bytes) -> list[Op] | None:
    """The operations of a frame; None where its checksum is another."""
    if _digest(head[: _FRAME.size], body, secret) != head[_FRAME.size : FRAME_BYTES]:
        return None
    try:
        return msgspec.msgpack.decode(body, type=list[Op])
    except ValueError:  # written by a ds_cp that knows other operations
        return None


def _digest(head: bytes, body: bytes, secret: bytes) -> bytes:
    digest = hashlib.blake2b(head, digest_size=DIGEST, key=secret)
    digest.update(body)
    return digest.digest()
