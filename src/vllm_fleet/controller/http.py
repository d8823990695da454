"""HTTP/1.1 on one listening socket: bytes in, requests out, answers back. Knows no membership.

Written on asyncio.Protocol for the heartbeats of a large fleet: through aiohttp each cost several times as much
(docs/benchmarks/README.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from enum import Enum
from http import HTTPStatus
from typing import cast

from vllm_fleet.controller.exchange import Answer, Feed, Request, Service, refusal
from vllm_fleet.controller.reader import RequestReader
from vllm_fleet.core import limits, log
from vllm_fleet.net import sockets

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Stage(Enum):
    """What a connection waits for."""

    NEW = "its first request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    ANSWER = "the service's answer"
    FEED = "a feed's next part"
    IDLE = "another request"
    ENDED = "the peer, who reads its last answer and leaves"


def _allowed_s(stage: Stage) -> float:
    match stage:
        case Stage.NEW | Stage.HEAD:
            return limits.CONTROL_HEAD_S
        case Stage.BODY:
            return limits.CONTROL_BODY_S
        case Stage.IDLE:
            return limits.CONTROL_IDLE_S
        case Stage.ENDED:
            return limits.CONTROL_LINGER_S
        case _:
            return float("inf")


def encode_answer(answer: Answer, *, keep_alive: bool = True, with_body: bool = True) -> bytes:
    """An answer's bytes; ``with_body`` is false where the question was HEAD."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in answer.headers) if answer.headers else ""
    if not keep_alive:
        lines += "Connection: close\r\n"
    if answer.status == 204:
        return b"%b%b\r\n" % (_STATUS_LINES[204], lines.encode())
    head = f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n{lines}\r\n".encode()
    return _STATUS_LINES[answer.status] + head + (answer.body if with_body else b"")


class Connection(asyncio.Protocol):
    """One connection: requests in order, each with its deadline; and the outlet of a feed.

    ``wait_until``: the event loop's time at which the server is to call on_late.
    """

    def __init__(self, service: Service, on_open: Callable[[Connection], bool], on_lost: Callable[[Connection], None]):
        self.wait_until = float("inf")
        self.stage = Stage.NEW
        self._service, self._on_open, self._on_lost = service, on_open, on_lost
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._feed: Feed | None = None
        self._deaf = False  # nothing that still arrives counts
        self._last = False  # the next answer is this connection's last
        self._blocked = False  # the peer does not read what it was sent

    # From the event loop ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername") or ("",)
        self._reader = RequestReader(self._service.refuse, str(peer[0]))
        if self._on_open(self):
            self._wait_for(Stage.NEW)
        else:
            self.cut()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self.stage is Stage.FEED:
            self.cut()  # whoever watches has nothing more to say
            return
        self._reader.feed(data)
        if self.stage is not Stage.ANSWER:
            self._go_on()

    def eof_received(self) -> None:
        """The peer left. One that only closed its half looks the same, and nobody is to work for the dead."""

    def pause_writing(self) -> None:
        self._blocked = True
        self.wait_until = self._loop.time() + limits.WATCH_WRITE_S
        if self._feed is None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._blocked = False
        self._wait_for(self.stage)
        if self._feed is not None:
            self._feed.on_room()
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._deaf, self.stage = True, Stage.ENDED
        if self._task is not None:
            self._task.cancel()  # nobody is there to be answered
        if self._feed is not None:
            feed, self._feed = self._feed, None
            feed.on_closed()
        self._on_lost(self)

    # From a feed -----------------------------------------------------------------------------------------------------

    def write(self, part: bytes) -> bool:
        """See Outlet."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(part), part) if self._reader.in_chunks else part)
        return not self._blocked

    def end(self) -> None:
        """See Outlet."""
        if self._reader.in_chunks:
            self._transport.write(b"0\r\n\r\n")
        self._close()

    def cut(self) -> None:
        """See Outlet."""
        self._deaf = True
        self._transport.abort()

    # From the server -------------------------------------------------------------------------------------------------

    def on_late(self) -> None:
        """What was waited for has not come."""
        if self._blocked:
            if self._feed is not None:
                log.warn("watcher.slow", write_s=limits.WATCH_WRITE_S)
            self.cut()
        elif self.stage in (Stage.HEAD, Stage.BODY):
            waited = f"{_allowed_s(self.stage)} s (limits.CONTROL_{self.stage.name}_S)"
            self._refuse(refusal(408, "too_slow", f"{self.stage.value} did not arrive within {waited}"))
        elif self.stage is Stage.ENDED:
            self.cut()
        else:
            self._close()

    def stop(self) -> None:
        """Close, once what is under way is answered. Feeds are ended by their owners."""
        self._last = True
        if self.stage not in (Stage.ANSWER, Stage.FEED):
            self._close()

    # Its own ---------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Do what can be done with what has arrived."""
        reader = self._reader
        while reader.requests and not self._deaf:
            self._take(reader.requests.popleft())
            if self.stage in (Stage.ANSWER, Stage.FEED):
                return
        if reader.refused is not None:
            self._refuse(reader.refused)
        elif reader.in_head and self.stage is not Stage.HEAD:
            self._wait_for(Stage.HEAD)  # once: more of the same head does not move its deadline
        elif reader.in_body and self.stage is not Stage.BODY:
            self._wait_for(Stage.BODY)
            if reader.take_expectation():
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _wait_for(self, stage: Stage) -> None:
        self.stage = stage
        if not self._blocked:
            self.wait_until = self._loop.time() + _allowed_s(stage)

    def _take(self, request: Request) -> None:
        handled = self._service.handle(request)
        if isinstance(handled, Answer):
            self._answer(request, handled)
        elif isinstance(handled, Coroutine):
            self._wait_for(Stage.ANSWER)
            self._task = self._loop.create_task(self._answer_later(request, handled))
        else:
            self._open(handled)

    async def _answer_later(self, request: Request, handled: Coroutine[None, None, Answer]) -> None:
        answer = await handled
        self._task = None
        self._answer(request, answer)
        self._go_on()

    def _answer(self, request: Request, answer: Answer) -> None:
        keep_alive = request.keep_alive and not self._last
        self._transport.write(encode_answer(answer, keep_alive=keep_alive, with_body=request.method != "HEAD"))
        if keep_alive:
            self._wait_for(Stage.IDLE)
        else:
            self._close()

    def _open(self, feed: Feed) -> None:
        self._feed = feed
        self._wait_for(Stage.FEED)
        framing = "Transfer-Encoding: chunked" if self._reader.in_chunks else "Connection: close"
        head = f"Content-Type: {feed.content_type}\r\nCache-Control: no-store\r\n{framing}\r\n\r\n"
        self._transport.write(_STATUS_LINES[200] + head.encode())
        feed.on_open(self)

    def _refuse(self, answer: Answer) -> None:
        """Answer what cannot become a request, and hear no more: the rest could be anything."""
        if self._deaf:
            return
        self._deaf = True
        self._transport.write(encode_answer(answer, keep_alive=False))
        with contextlib.suppress(OSError, NotImplementedError):
            self._transport.write_eof()  # not close(): with bytes unread, a reset could overtake the answer
        self._wait_for(Stage.ENDED)

    def _close(self) -> None:
        self._deaf = True
        self._transport.close()
        self._wait_for(Stage.ENDED)


class HttpServer:
    """Serves one Service. ``sweep`` must be called a few times a second: it ends what is late."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._nobody = asyncio.Event()
        self._open_max = 0

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on ``listener``, which this server then owns."""
        self._open_max = sockets.allow_many() - limits.CONTROL_FILES_KEPT

        def accepted() -> Connection:
            return Connection(self._service, self._on_open, self._on_lost)

        self._server = await sockets.serve(listener, accepted, limits.CONTROL_BACKLOG)

    def sweep(self, now: float) -> None:
        """``now``: the event loop's time."""
        for late in [one for one in self._open if one.wait_until <= now]:
            late.on_late()

    def stages(self) -> list[Stage]:
        """What each connection waits for."""
        return [one.stage for one in self._open]

    async def close(self, patience_s: float) -> None:
        """Take nothing new, let what is under way end within ``patience_s``, and close everything."""
        if self._server is not None:
            self._server.close()
        for one in list(self._open):
            one.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self._open:
                    self._nobody.clear()
                    await self._nobody.wait()
        for one in list(self._open):
            one.cut()
        await asyncio.sleep(0)  # the loop tells them that they are lost

    def _on_open(self, connection: Connection) -> bool:
        if len(self._open) >= min(limits.CONTROL_CONNECTIONS_MAX, self._open_max):
            return False
        self._open.add(connection)
        return True

    def _on_lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._nobody.set()
