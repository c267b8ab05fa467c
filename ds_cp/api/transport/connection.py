"""One connection: HTTP/1.1 as RFC 9112 has it, within bounds and deadlines."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import httptools
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ds_cp.api.transport.capacity import Capacity, Seldom
from ds_cp.api.transport.ending import end_by_closing, end_early
from ds_cp.api.transport.flow import Flow, WriteDeadline
from ds_cp.api.transport.head import EVERYTHING, check_head, is_unknown_method, without_upgrade
from ds_cp.api.transport.refusal import RefusedError, not_http
from ds_cp.api.transport.wire import MAX_PIPELINED, READ_BYTES, Bounds

logger = logging.getLogger("ds_cp.api")

EXTRA_HEAD_S = 2.0  # seconds for the head of a request on a connection beyond the bound
GRACE_S = 0.25  # seconds in which a connection that has sent nothing yet need not make room
LAST_READ_S = 5.0  # seconds that a client gets to read on once the server is ending
_LINGER_S = 1.0  # seconds of reading on after the last answer, so that the client can read it
_LINGER_BYTES = 4 * 2**20  # bytes read on after the last request of a connection


@dataclass(frozen=True)
class Shared:
    """What the connections of a server have in common."""

    capacity: Capacity
    header_timeout_s: float
    write_timeout_s: float
    busy: ASGIApp  # answers in place of the application when there are too many connections
    options: ASGIApp  # answers OPTIONS *
    # Filled and parsed within one callback of the loop, so one is enough for all connections.
    buffer: bytearray = field(default_factory=lambda: bytearray(READ_BYTES))
    unread: Seldom = field(default_factory=lambda: Seldom(10.0))


class Connection(HttpToolsProtocol, asyncio.BufferedProtocol):
    """uvicorn's protocol over a parser in C, with what both leave open.

    Heads, bodies and unread answers have deadlines; what arrives is read ``READ_BYTES`` at a time
    and bounded by ``Bounds``; what is not HTTP/1.1 is answered as ``RefusedError`` says.
    """

    flow: Flow

    def __init__(
        self, shared: Shared, config: Config, state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config, state, app_state)
        self._shared = shared
        self._bounds = Bounds()
        self._heard = False  # something was read, or GRACE_S are over
        self._part = ""  # of a request being read: "head", "body", or "" between two
        self._ended = False  # a request was whole since this read began
        self._upgrade = False  # the head asks for another protocol, and is read again without that
        self._running: RequestResponseCycle | None = None  # the request being answered
        self._refusal: RefusedError | None = None  # why the parser was stopped
        self._deaf = False  # no further request is read
        self._discarded = 0  # bytes since then
        self._timer: asyncio.TimerHandle | None = None  # of a head, or of the end
        self._application: ASGIApp = self.app
        self._renew_parser()

    # --- the transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection must send a whole head in time."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing whenever the socket is full
        self.flow = Flow(transport)
        self._writing = WriteDeadline(
            self.loop, transport, self._shared.write_timeout_s, self._on_unread
        )
        beyond = self._shared.capacity.is_beyond(self)
        patience = self._shared.header_timeout_s
        self._set_timer(min(patience, EXTRA_HEAD_S) if beyond else patience, self._on_late_head)
        self.loop.call_later(GRACE_S, self._hear)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free its place."""
        self._stop_timer()
        self._writing.end()
        self._shared.capacity.discard(self)
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where the transport reads to."""
        return self._shared.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes were read."""
        self.data_received(bytes(memoryview(self._shared.buffer)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Parse them. A head that has begun gets its deadline."""
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        self._hear()
        if self._deaf or self.parser is None:
            self._discard(len(data))
            return
        self._ended = False
        fresh = self._part == "" and not self._bounds.wire
        try:
            self._feed(data)
            if not self._ended:
                self._bounds.read(len(data), self._part == "body")
        except (httptools.HttpParserError, RefusedError) as err:
            self._stop(self._cause(err, data if fresh and not self._ended else b""))
            return
        if self._part != "body" and self._running is None and self._timer is None:
            self._set_timer(self._shared.header_timeout_s, self._on_late_head)
        pause_s = self._bounds.pause_s(len(data))
        if pause_s:
            self.flow.hold(self.loop, pause_s)

    def pause_writing(self) -> None:
        """The client does not take what it was sent: its time to read begins."""
        super().pause_writing()
        self._writing.begin()
        self._count()

    def resume_writing(self) -> None:
        """It has taken all of it."""
        super().resume_writing()
        self._writing.end()
        self._count()

    # --- the parser's calls

    def on_message_begin(self) -> None:
        """A request begins."""
        if len(self.pipeline) >= MAX_PIPELINED:  # as many are answered; the client asks again
            self.pipeline[0][0].keep_alive = False
            raise RefusedError(0, "")
        super().on_message_begin()
        self._bounds.begin()
        self._part, self._upgrade = "head", False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer: those are dropped (RFC 9112, 7.1.2)."""
        self._bounds.line()
        if self._part == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is whole: the application is called."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self._bounds.head(len(self.url) + sum(len(n) + len(v) for n, v in self.headers))
        head = check_head(method, version, self.url, self.headers)
        if self.parser.should_upgrade():
            self._upgrade = True
            return
        self._stop_timer()
        self.url = head.target
        self.headers[:] = head.headers  # the same list is in the scope
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1
        self.app = self._application_for(head.target)
        super().on_headers_complete()
        self._part, cycle = "body", self.cycle  # only now does the request have a cycle
        end_early(cycle, self._on_early_end)
        if version == "1.0":
            end_by_closing(cycle)
        if self._shared.capacity.is_beyond(self):
            cycle.keep_alive = False
        if not self.pipeline:
            self._running = cycle
        self._writing.renew()
        self._count()

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self._bounds.chunk()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._bounds.body(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole, unless its head is to be read again."""
        if self._upgrade:
            return
        self._part, self._ended = "", True
        self._bounds.whole()
        super().on_message_complete()

    # --- uvicorn's calls

    def on_response_complete(self) -> None:
        """After an answer: the next request, a refusal that waited for it, or idleness."""
        self._running = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        self._count()
        if self._running is not None or self.transport.is_closing():
            return
        if self._deaf:
            self._refuse()
        elif self._part == "head":
            self._set_timer(self._shared.header_timeout_s, self._on_late_head)

    def shutdown(self) -> None:
        """The server is ending: what is in flight may finish, if its client reads."""
        self._writing.shorten(LAST_READ_S)
        super().shutdown()

    def give_way(self) -> None:
        """Close at once, for another connection."""
        self.transport.abort()

    # --- its own

    def _application_for(self, target: bytes) -> ASGIApp:
        if target == EVERYTHING:
            return self._shared.options
        path = target.partition(b"?")[0]
        if path.rstrip(b"/") == b"/health" or self._shared.capacity.take_place(self):
            return self._application
        return self._shared.busy

    def _renew_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        # What follows a request with "Connection: close" is ignored; later 1.x are read as 1.1.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True, lenient_version=True)

    def _feed(self, data: bytes) -> None:
        """Parse. A head that asks for another protocol is parsed again without that wish: the
        parser would leave out the body of its request."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                method, version = self.parser.get_method(), self.parser.get_http_version()
                head = without_upgrade(method, self.url, version, self.headers)
                self._renew_parser()
                data = head + data[stop.args[0] :]

    def _cause(self, err: Exception, data: bytes) -> RefusedError:
        """What to answer to an error of the parser, or of a call of the parser. ``data``: the bytes
        that the request begins with, or nothing if they are not known."""
        if isinstance(err, httptools.HttpParserCallbackError):
            cause = err.__context__
            if isinstance(cause, RefusedError):
                return cause
            if not isinstance(cause, httptools.HttpParserError):
                logger.error("a request could not be read", exc_info=cause)
                return RefusedError(500, "internal error; the server's log has the details")
        if isinstance(err, RefusedError):
            return err
        if isinstance(err, httptools.HttpParserInvalidMethodError) and is_unknown_method(data):
            return RefusedError(501, "the method of the request is not known here")
        return not_http(str(err))

    def _stop(self, refusal: RefusedError) -> None:
        """Read no further request, and answer ``refusal`` once the ones before are answered."""
        self._deaf = True
        self._refusal = refusal if refusal.status else None
        culprit = self.cycle if self._part == "body" else None
        if culprit is not None and culprit is not self._running:
            self.pipeline.popleft()  # it has not begun
        elif culprit is not None and not culprit.response_complete:
            culprit.disconnected = True  # the application sees a client that has left
            culprit.message_event.set()
            if culprit.response_started:
                self.transport.abort()
                return
            self._running = None
        if self._running is None:
            self._refuse()

    def _refuse(self) -> None:
        """Write the refusal, if any, and wait for the client to close (RFC 9112, 9.6). It keeps
        its place only as long as nobody needs it."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._refusal is not None:
            target = self.url if self._part else b""  # of the request that is refused
            self.transport.write(self._refusal.answer(target))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer(_LINGER_S, self._on_lingered)
        self._count()

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > _LINGER_BYTES:
            self.transport.abort()

    def _on_late_head(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._bounds.wire:
            self._stop(RefusedError(408, "the request's head was not received in time"))
        else:
            self.transport.close()

    def _on_early_end(self) -> None:
        self._deaf = True

    def _on_lingered(self) -> None:
        if self.flow.write_paused:  # it has yet to read its answer, which has a deadline of its own
            self._set_timer(_LINGER_S, self._on_lingered)
        else:
            self.transport.abort()

    def _on_unread(self, waiting: int) -> None:
        self._shared.unread.warning(
            f"a client that did not read was closed; {waiting} bytes of its answer were left"
        )
        self.transport.abort()

    def _hear(self) -> None:
        if not self._heard:
            self._heard = True
            self._count()

    def _count(self) -> None:
        idle = self._heard and self._running is None and not self.flow.write_paused
        self._shared.capacity.set_idle(self, idle)

    def _set_timer(self, seconds: float, call: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, call)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
