"""The client's side of one connection: one question at a time, and its answer no faster than it is read."""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol, cast

from vllm_fleet.core import limits
from vllm_fleet.net.http.answers import AnswerReader
from vllm_fleet.net.http.messages import BrokenOff, NotHttp

Origin = tuple[str, int]
"""Host and port; port 0: the host is the path of a unix socket."""


class Keeper(Protocol):
    """Who keeps a connection while nobody asks it anything."""

    def on_idle(self, connection: ClientConnection) -> None:
        """It can be asked again."""
        ...

    def on_lost(self, connection: ClientConnection) -> None:
        """It is closed."""
        ...


class ClientConnection(asyncio.Protocol):
    """One connection: one question at a time."""

    def __init__(self, keeper: Keeper, origin: Origin) -> None:
        self.origin = origin
        self.closed = False
        self.idle_since = 0.0
        self.reused = False
        """Whether the question under way is not its first."""
        self.asked_at = 0.0
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._reader: AnswerReader | None = None
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._held = self._behind = False
        self._ahead_bytes = 0

    # From the event loop ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:
            self.cut()  # nobody asked
            return
        try:
            reader.feed(data)
        except NotHttp as error:
            self._failure = error
            self.cut()
        self._ahead_bytes += len(data)
        if self._ahead_bytes > limits.ANSWER_AHEAD_BYTES_MAX and not self._held and not self.closed:
            self._held = True
            self.transport.pause_reading()
        self._wake()

    def pause_writing(self) -> None:
        self._behind = True

    def resume_writing(self) -> None:
        self._behind = False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._keeper.on_lost(self)
        reader = self._reader
        if reader is not None and self._failure is None and not (error is None and reader.on_close()):
            soon = self._loop.time() - self.asked_at < limits.STALE_S
            said = f": {error}" if error is not None else ""
            self._failure = BrokenOff(f"the server closed the connection before its answer was complete{said}",
                                      stale=self.reused and soon and not reader.began)  # fmt: skip
        self._wake()

    # From an answer --------------------------------------------------------------------------------------------------

    def ask(self, question: bytes, reader: AnswerReader) -> None:
        """Send a question; its answer goes into ``reader``."""
        self._reader, self._failure, self._ahead_bytes = reader, None, 0
        self.asked_at = self._loop.time()
        self.transport.write(question)

    async def wait(self) -> None:
        """Return when something came.

        Raises:
            BrokenOff, NotHttp: nothing will come any more.
        """
        self.check()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        # What came before a failure is for the reader first.

    def check(self) -> None:
        """Raise what ended this connection, if it did before its answer was complete."""
        if self._failure is not None:
            raise self._failure

    def taken(self) -> None:
        """The owner took all parts that were here."""
        self._ahead_bytes = 0
        if self._held:
            self._held = False
            if not self.closed:
                self.transport.resume_reading()

    def release(self) -> None:
        """The owner is done with the answer, or does not want the rest of it."""
        reader, self._reader = self._reader, None
        if self.closed:
            return
        head = reader.head if reader is not None and reader.complete and not reader.extra else None
        if head is None or not head.keep_alive or self._behind or self._failure is not None:
            self.cut()
        else:
            self.taken()
            self.reused, self.idle_since = True, self._loop.time()
            self._keeper.on_idle(self)

    def cut(self) -> None:
        """Close at once."""
        self.closed = True
        if self._reader is not None and self._failure is None:
            self._failure = BrokenOff("the connection was closed from here")
        self.transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
