"""One answer's way out of a connection: framed, in order, no faster than the peer reads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vllm_fleet.core.errors import Bug
from vllm_fleet.net.http.encoding import encode_lines, has_body, status_line
from vllm_fleet.net.http.messages import Pairs, PeerLeft, Request

if TYPE_CHECKING:
    from vllm_fleet.net.http.connection import Connection


class Writer:
    """``start`` once, then ``write`` any number of times; ``finish`` is called by the connection.

    The head leaves with the first part of the body, so that a short answer is one packet; ``flush`` sends it before.
    """

    __slots__ = (
        "_body",
        "_chunked",
        "_connection",
        "_date",
        "_finished",
        "_head",
        "_left",
        "_lost",
        "_request",
        "_room",
        "keeps",
        "status",
    )

    def __init__(self, connection: Connection, request: Request, date: bytes) -> None:
        self._connection, self._request, self._date = connection, request, date
        self._head = b""
        self._chunked = self._finished = self._lost = False
        self._body = True
        self._left: int | None = None  # bytes that the announced length still wants
        self._room: asyncio.Future[None] | None = None
        self.status: int | None = None
        """What the client was told; None: nothing yet."""
        self.keeps = False
        """Whether the connection can take another request after this answer."""

    @property
    def behind(self) -> bool:
        """Whether the peer reads more slowly than is written: wait for ``drain`` then."""
        return self._connection.blocked

    def start(self, status: int, pairs: Pairs, length: int | None) -> None:
        """Status and headers, without those that frame the body; ``length`` of the body where it is known.

        Raises:
            PeerLeft: the client hung up.
        """
        if self._lost:
            raise PeerLeft("the client hung up before its answer began")
        assert self.status is None, "an answer is started once"
        self.status = status
        head = self._request.head
        in_chunks = head is None or head.in_chunks
        keeps = self._request.keep_alive and not self._connection.last
        framing = b""
        if not has_body(status):
            self._body, self._left = False, 0
        elif length is not None:
            self._left = length
            framing = b"Content-Length: %d\r\n" % length
        elif in_chunks:
            self._chunked = True
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            keeps = False
        if self._request.method == "HEAD":
            self._body = False
        if not keeps:
            framing += b"Connection: close\r\n"
        elif not in_chunks:
            framing += b"Connection: keep-alive\r\n"
        self.keeps = keeps
        self._head = b"%b%b%b%b\r\n" % (status_line(status), encode_lines(pairs), self._date, framing)

    def write(self, data: bytes) -> None:
        """Send a part of the body.

        Raises:
            PeerLeft: the client hung up.
        """
        if self._lost:
            raise PeerLeft("the client hung up")
        assert self.status is not None, "an answer is started before it is written"
        if not data:
            return
        if self._left is not None and self._body:
            self._left -= len(data)
            if self._left < 0:
                raise Bug("an answer is longer than its head says")
        head, self._head = self._head, b""
        if not self._body:
            data = head
        elif self._chunked:
            data = b"%b%x\r\n%b\r\n" % (head, len(data), data)
        elif head:
            data = head + data
        if data:
            self._connection.transport.write(data)

    def flush(self) -> None:
        """Send the head now."""
        if self._head and not self._lost:
            self._connection.transport.write(self._head)
            self._head = b""

    async def drain(self) -> None:
        """Wait until the peer has caught up.

        Raises:
            PeerLeft: the client hung up.
        """
        while self._connection.blocked and not self._lost:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        if self._lost:
            raise PeerLeft("the client hung up")

    def abort(self) -> None:
        """Cut the connection, so that the client cannot take the answer for a complete one."""
        self._lost = True
        self._connection.cut()

    def finish(self) -> None:
        """The answer is complete; one that is not cuts the connection.

        Raises:
            PeerLeft: the client hung up, or nothing told it that its answer is complete.
        """
        if self._lost:
            raise PeerLeft("the client hung up")
        if self.status is None or (self._body and self._left):
            self.abort()
            raise PeerLeft("an answer was left unfinished")
        end = self._head + b"0\r\n\r\n" if self._chunked and self._body else self._head
        self._head = b""
        if end:
            self._connection.transport.write(end)

    # From the connection ---------------------------------------------------------------------------------------------

    def on_room(self) -> None:
        """The peer has caught up."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def on_lost(self) -> None:
        """The connection is gone."""
        self._lost = True
        self.on_room()
