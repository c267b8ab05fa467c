"""How much a connection may make the server do for what it asks: the bounds and their counters.

A sender chooses how many bytes, lines, chunks and segments carry a request. Each of them costs
work whatever it carries, so each is bounded, relative to the body that arrives with it.
"""

from __future__ import annotations

from ds_cp.api.transport.refusal import RefusedError

READ_BYTES = 16 * 1024  # bytes of a connection that one turn of the loop reads
MAX_HEAD_BYTES = 32 * 1024  # bytes of a head on the wire
MAX_LINES = 128  # header lines of a request, trailers included
FREE_CHUNKS = 1024  # chunks of a body whatever they hold
CHUNK_BYTES = 64  # bytes that the chunks beyond those hold on average, at least
FREE_WIRE_BYTES = 32 * 1024  # bytes on the wire for a body whatever it holds
WIRE_PER_BODY = 2  # bytes on the wire beyond those for one byte of body
MAX_PIPELINED = 16  # requests of a connection that wait behind the one being answered
FREE_READS = 64  # reads of one request before small ones are slowed down
SMALL_READ_BYTES = 1024  # bytes of a read that is not small
SMALL_READ_PAUSE_S = 0.01  # seconds between small reads beyond the free ones


class Bounds:
    """Counters of the request that a connection is reading."""

    def __init__(self) -> None:
        self.wire = 0  # bytes read since the last request was whole
        self.reads = 0  # reads since then
        self.begin()

    def begin(self) -> None:
        """Another request begins."""
        self._lines = 0
        self._chunks = 0
        self._body = 0
        self._body_wire = 0

    def line(self) -> None:
        """A header or a trailer was read. Raises ``RefusedError``."""
        self._lines += 1
        if self._lines > MAX_LINES:
            raise RefusedError(431, f"the request has more than {MAX_LINES} header lines")

    def head(self, count: int) -> None:
        """A head is whole; its target, names and values have ``count`` bytes. Raises
        ``RefusedError``."""
        if count > MAX_HEAD_BYTES:
            raise RefusedError(
                431, f"the head of the request has {count} bytes; at most {MAX_HEAD_BYTES}"
            )

    def chunk(self) -> None:
        """A chunk begins. Raises ``RefusedError``."""
        self._chunks += 1
        if self._body < (self._chunks - FREE_CHUNKS) * CHUNK_BYTES:
            raise RefusedError(
                400,
                f"{self._chunks - 1} chunks hold {self._body} bytes of body; beyond {FREE_CHUNKS} "
                f"chunks send {CHUNK_BYTES} bytes or more in each",
            )

    def body(self, count: int) -> None:
        """``count`` bytes of a body were read."""
        self._body += count

    def whole(self) -> None:
        """The request is whole."""
        self.wire = self.reads = 0

    def read(self, count: int, in_body: bool) -> None:
        """``count`` bytes were read and parsed, and the request is not whole. Raises
        ``RefusedError``."""
        self.wire += count
        self.reads += 1
        if not in_body:
            if self.wire > MAX_HEAD_BYTES:
                raise RefusedError(
                    431, f"the head of the request has more than {MAX_HEAD_BYTES} bytes"
                )
            return
        self._body_wire += count
        if self._body_wire > FREE_WIRE_BYTES + READ_BYTES + WIRE_PER_BODY * self._body:
            raise RefusedError(
                400,
                f"{self._body_wire} bytes were sent for a body of {self._body}; "
                "send larger chunks, without extensions or trailers",
            )

    def pause_s(self, count: int) -> float:
        """Seconds to wait before the next read, after one of ``count`` bytes."""
        small = count < SMALL_READ_BYTES and self.reads > FREE_READS
        return SMALL_READ_PAUSE_S if small else 0.0
