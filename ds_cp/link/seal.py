"""Who is on the other side of a connection, and that nothing on it was changed: HMAC-SHA256 under
the job's secret. Bytes in, bytes out; who calls this does the reading and writing.

    server: Greeting(protocol, nonce)
    client: Proved(Claim(purpose, rank, size, ..., nonce), HMAC over greeting and claim)
    server: Proved(Verdict(refused, ...), HMAC over all three)
    then frames both ways, each with an HMAC over its number and its bytes, under keys of this
    connection and direction

A proof of one side is none of the other's, and none on another connection. Nothing is encrypted.
Without a secret the same bytes travel, and prove nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Literal, TypeVar

import msgspec

from ds_cp.errors import DsCpError

PROTOCOL = "ds_cp link 1"
MAX_UNPROVED = 4096  # bytes of a frame from somebody who has proved nothing yet
MAX_FRAME = 1 << 22  # bytes of any other
MAX_TEXT = 255  # characters of a name
HEAD = 4  # bytes of a frame's length, which come before it
_NONCE, _MAC = 32, 16  # bytes

Purpose = Literal["control", "store"]
T = TypeVar("T")


class SealError(DsCpError):
    """What has arrived is not from a process of this job that speaks this protocol."""


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """What the server says to anybody."""

    protocol: str
    nonce: bytes


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """Who the client says that it is. ``mark``: digest of its config; ``version``: of ds_cp."""

    purpose: Purpose
    rank: int
    size: int
    host: str
    pid: int
    version: str
    mark: str
    nonce: bytes = b""


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What the server makes of it: ``refused`` is why not, empty where the client is let in.
    ``secret``: it knows another secret, and what follows is not proved by ours. ``host``, ``pid``:
    of the server."""

    refused: str
    host: str = ""
    pid: int = 0
    secret: bool = False


class _Proved(msgspec.Struct, frozen=True, array_like=True):
    body: bytes
    proof: bytes


class RefusedError(DsCpError):
    """The server does not let this process in; the message is its reason. ``secret``: since one of
    the two knows another secret; else the server has proved that it knows ours."""

    def __init__(self, message: str, secret: bool) -> None:
        super().__init__(message)
        self.secret = secret


def framed(payload: bytes) -> bytes:
    """A payload as it travels, with its length before it."""
    return len(payload).to_bytes(HEAD, "big") + payload


def size_of(head: bytes, limit: int) -> int:
    """The length of the frame that follows. Raises ``SealError`` above ``limit``."""
    size = int.from_bytes(head, "big")
    if size > limit:
        raise SealError(f"a frame of {size} bytes is above the limit {limit}")
    return size


class Seal:
    """Frames of one connection after it was proved. ``key``: of the connection."""

    def __init__(self, key: bytes, is_client: bool) -> None:
        sides = [_mac(key, side) for side in (b"from client", b"from server")]
        self._out_key, self._in_key = sides if is_client else reversed(sides)
        self._out = self._in = 0  # frames so far

    def close_over(self, payload: bytes) -> bytes:
        """The next frame to send. Raises ``ValueError`` for a payload above the limit."""
        if len(payload) + _MAC > MAX_FRAME:
            raise ValueError(f"a message of {len(payload)} bytes is above the limit {MAX_FRAME}")
        mac = _mac(self._out_key, _number(self._out), payload)[:_MAC]
        self._out += 1
        return framed(mac + payload)

    def open(self, frame: bytes) -> bytes:
        """The payload of the next frame that has arrived, without its length. Raises ``SealError``
        when it is not the one that was sent."""
        mac, payload = frame[:_MAC], frame[_MAC:]
        expected = _mac(self._in_key, _number(self._in), payload)[:_MAC]
        if not hmac.compare_digest(mac, expected):
            raise SealError("a frame was not sealed by the other side of this connection")
        self._in += 1
        return payload


class ServerProof:
    """The server's part in one connection: ``greeting`` goes out first, length and all."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.greeting: bytes = framed(
            msgspec.msgpack.encode(Greeting(PROTOCOL, os.urandom(_NONCE)))
        )
        self._said = self.greeting

    def claim(self, frame: bytes) -> tuple[Claim, bool]:
        """Who the client says that it is, and whether it knows the secret. Raises ``SealError`` for
        what is no claim."""
        proved = _decode(frame, _Proved)
        found = _decode(proved.body, Claim)
        for text in (found.host, found.version, found.mark):  # which may be shown
            if len(text) > MAX_TEXT or not text.isprintable():
                raise SealError(f"a name of {len(text)} characters that is none")
        known = hmac.compare_digest(
            proved.proof, _mac(self._secret, b"client", self._said, proved.body)
        )
        self._said += proved.body
        return found, known

    def verdict(self, verdict: Verdict) -> tuple[bytes, Seal]:
        """The answer, to be sent, and what seals the frames that follow where the client is let
        in."""
        body = msgspec.msgpack.encode(verdict)
        # Who knows the secret has an answer of somebody who does; anybody else has no proof at all.
        proof = b"" if verdict.secret else _mac(self._secret, b"server", self._said, body)
        key = _mac(self._secret, b"connection", self._said)
        return framed(msgspec.msgpack.encode(_Proved(body, proof))), Seal(key, False)


class ClientProof:
    """The client's part in one connection."""

    def __init__(self, secret: bytes, claim: Claim) -> None:
        self._secret = secret
        self._claim = claim
        self._said = b""

    def answer(self, frame: bytes) -> bytes:
        """What to send after the server's greeting. Raises ``SealError`` for what is none."""
        greeting = _decode(frame, Greeting)
        if greeting.protocol != PROTOCOL:
            raise SealError(f"the other side speaks {greeting.protocol[:40]!r}, not {PROTOCOL!r}")
        body = msgspec.msgpack.encode(
            msgspec.structs.replace(self._claim, nonce=os.urandom(_NONCE))
        )
        greeted = framed(frame)
        proof = _mac(self._secret, b"client", greeted, body)
        self._said = greeted + body
        return framed(msgspec.msgpack.encode(_Proved(body, proof)))

    def verdict(self, frame: bytes) -> tuple[Verdict, Seal]:
        """The server's answer, and what seals the frames that follow. Raises ``RefusedError``,
        ``SealError`` for what is no answer."""
        proved = _decode(frame, _Proved)
        found = _decode(proved.body, Verdict)
        expected = _mac(self._secret, b"server", self._said, proved.body)
        if not hmac.compare_digest(proved.proof, expected):
            raise RefusedError("one of the two sides knows another secret", secret=True)
        if found.refused:
            raise RefusedError(found.refused, secret=False)
        return found, Seal(_mac(self._secret, b"connection", self._said), True)


def _mac(key: bytes, *parts: bytes) -> bytes:
    """Of parts that are told apart by their lengths."""
    made = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        made.update(len(part).to_bytes(8, "big") + part)
    return made.digest()


def _number(count: int) -> bytes:
    return count.to_bytes(8, "big")


def _decode(raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as err:
        raise SealError(f"not a message of this protocol: {str(err)[:100]}") from None
