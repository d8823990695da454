"""The server's side of one connection: requests in order, each with its deadline, and its answer's way out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from enum import Enum
from typing import Protocol, cast

from vllm_fleet.core import log
from vllm_fleet.net.http.encoding import STATUS_LINES, encode_answer
from vllm_fleet.net.http.messages import Answer, Explain, Feed, PeerLeft, Request, Rules, Service, Speaker
from vllm_fleet.net.http.reader import Heads, RequestReader
from vllm_fleet.net.http.writer import Writer

_NEVER = float("inf")


class Stage(Enum):
    """What a connection waits for."""

    NEW = "its first request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    ANSWER = "the service's answer"
    FEED = "a feed's next part"
    IDLE = "another request"
    ENDED = "the peer, who reads its last answer and leaves"


class Home(Protocol):
    """The server that a connection belongs to."""

    service: Service
    rules: Rules
    explain: Explain
    heads: Heads
    allowed_s: dict[Stage, float]
    date: bytes
    """A header line, or nothing."""

    def on_open(self, connection: Connection) -> bool:
        """Whether the connection may stay."""
        ...

    def on_lost(self, connection: Connection) -> None:
        """It is gone."""
        ...


def allowed_s(rules: Rules) -> dict[Stage, float]:
    """How long a connection may wait for each."""
    return {
        Stage.NEW: rules.head_s,
        Stage.HEAD: rules.head_s,
        Stage.BODY: rules.body_s,
        Stage.ANSWER: _NEVER,
        Stage.FEED: _NEVER,
        Stage.IDLE: rules.idle_s,
        Stage.ENDED: rules.linger_s,
    }


class Connection(asyncio.Protocol):
    """One connection; and the outlet of a feed.

    ``wait_until``: the event loop's time at which the server is to call on_late.
    """

    def __init__(self, home: Home) -> None:
        self.wait_until = _NEVER
        self.stage = Stage.NEW
        self._home, self._service = home, home.service
        self._allowed_s = home.allowed_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._feed: Feed | None = None
        self._writer: Writer | None = None
        self._deaf = False  # nothing that still arrives counts
        self._earned_s = 0.0  # what a body has won beyond body_s
        self._held = False  # no more is read from the peer: too much of it waits
        self.last = False
        """The next answer is this connection's last."""
        self.blocked = False
        """The peer does not read what it was sent."""

    # From the event loop ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername") or ("",)
        home = self._home
        self._reader = RequestReader(home.rules, self._service.refuse, home.explain, str(peer[0]), home.heads)
        if home.on_open(self):
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
        elif self._reader.requests and self._home.rules.public and not self._held:
            self._held = True  # the peer sends ahead: enough is here; that it hangs up will show when it is answered
            self.transport.pause_reading()

    def eof_received(self) -> None:
        """The peer left. One that only closed its half looks the same, and nobody is to work for the dead."""

    def pause_writing(self) -> None:
        self.blocked = True
        self.wait_until = self._loop.time() + self._home.rules.write_s
        if self.stage is not Stage.ANSWER and self._feed is None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.blocked = False
        self._wait_for(self.stage)
        if self._writer is not None:
            self._writer.on_room()
        if self._feed is not None:
            self._feed.on_room()
        elif not self._held and not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._deaf, self.stage = True, Stage.ENDED
        if self._writer is not None:
            self._writer.on_lost()
        if self._task is not None:
            self._task.cancel()  # nobody is there to be answered
        if self._feed is not None:
            feed, self._feed = self._feed, None
            feed.on_closed()
        self._home.on_lost(self)

    # From a feed -----------------------------------------------------------------------------------------------------

    def write(self, part: bytes) -> bool:
        """See Outlet."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if self._in_chunks else part)
        return not self.blocked

    def end(self) -> None:
        """See Outlet."""
        if self._in_chunks:
            self.transport.write(b"0\r\n\r\n")
        self._close()

    def cut(self) -> None:
        """See Outlet."""
        self._deaf = True
        self.transport.abort()

    # From the server -------------------------------------------------------------------------------------------------

    def on_late(self, now: float) -> None:
        """What was waited for has not come."""
        rules = self._home.rules
        if self.blocked:
            if self._feed is not None:
                log.warn("watcher.slow", write_s=rules.write_s)
            self.cut()
        elif self.stage in (Stage.HEAD, Stage.BODY):
            if self.stage is Stage.BODY and (more_s := self._reader.body_bytes / rules.body_rate_min) > self._earned_s:
                self.wait_until += more_s - self._earned_s
                self._earned_s = more_s
            if self.wait_until > now:
                return
            waited = f"{self._allowed_s[self.stage]} s"
            self._refuse(self._home.explain(408, "too_slow", f"{self.stage.value} did not arrive within {waited}"))
        elif self.stage is Stage.ENDED:
            self.cut()
        else:
            self._close()

    def stop(self) -> None:
        """Close, once what is under way is answered. Feeds are ended by their owners."""
        self.last = True
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
        if self._held:
            self._held = False
            if not self.blocked and not self.transport.is_closing():
                self.transport.resume_reading()
        if reader.refused is not None:
            self._refuse(reader.refused)
        elif reader.in_head and self.stage is not Stage.HEAD:
            self._wait_for(Stage.HEAD)  # once: more of the same head does not move its deadline
        elif reader.in_body and self.stage is not Stage.BODY:
            self._earned_s = 0.0
            self._wait_for(Stage.BODY)
            if reader.take_expectation():
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _wait_for(self, stage: Stage) -> None:
        self.stage = stage
        if not self.blocked:
            self.wait_until = self._loop.time() + self._allowed_s[stage]

    def _take(self, request: Request) -> None:
        handled = self._service.handle(request)
        if isinstance(handled, Answer):
            self._answer(request, handled)
        elif isinstance(handled, Speaker):
            self._wait_for(Stage.ANSWER)
            self._writer = Writer(self, request, self._home.date)
            self._task = self._loop.create_task(self._speak(handled, self._writer))
        elif isinstance(handled, Coroutine):
            self._wait_for(Stage.ANSWER)
            self._task = self._loop.create_task(self._answer_later(request, handled))
        else:
            self._open(request, handled)

    async def _answer_later(self, request: Request, handled: Coroutine[None, None, Answer]) -> None:
        answer = await handled
        self._task = None
        self._answer(request, answer)
        self._go_on()

    async def _speak(self, speaker: Speaker, writer: Writer) -> None:
        try:
            await speaker.speak(writer)
            writer.finish()
        except PeerLeft:
            self.cut()
            return
        except BaseException:
            self.cut()
            raise
        finally:
            self._task = self._writer = None
        self._answered(writer.keeps)
        self._go_on()

    def _answer(self, request: Request, answer: Answer) -> None:
        keep_alive = request.keep_alive and not self.last
        more = self._home.date
        if more and keep_alive and request.head is not None and not request.head.in_chunks:
            more += b"Connection: keep-alive\r\n"  # HTTP/1.0 must be told
        with_body = request.method != "HEAD"
        self.transport.write(encode_answer(answer, keep_alive=keep_alive, with_body=with_body, more=more))
        self._answered(keep_alive)

    def _answered(self, keep_alive: bool) -> None:
        if not keep_alive:
            self._close()
            return
        self._wait_for(Stage.IDLE)
        if self.blocked and not self.transport.is_closing():
            self.transport.pause_reading()  # who does not read is not heard either

    def _open(self, request: Request, feed: Feed) -> None:
        self._feed = feed
        self._wait_for(Stage.FEED)
        self._in_chunks = request.head is None or request.head.in_chunks
        framing = "Transfer-Encoding: chunked" if self._in_chunks else "Connection: close"
        head = f"Content-Type: {feed.content_type}\r\nCache-Control: no-store\r\n{framing}\r\n\r\n"
        self.transport.write(STATUS_LINES[200] + self._home.date + head.encode())
        feed.on_open(self)

    def _refuse(self, answer: Answer) -> None:
        """Answer what cannot become a request, and hear no more: the rest could be anything."""
        if self._deaf:
            return
        self._deaf = True
        self.transport.write(encode_answer(answer, keep_alive=False, more=self._home.date))
        self._wait_for(Stage.ENDED)
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError, NotImplementedError):
                self.transport.write_eof()  # not close(): with bytes unread, a reset could overtake the answer
        else:
            self.transport.close()  # TLS

    def _close(self) -> None:
        self._deaf = True
        self.transport.close()
        self._wait_for(Stage.ENDED)
