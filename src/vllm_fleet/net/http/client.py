"""Asking HTTP/1.1 servers over kept connections. No redirects, no proxies, no cookies, no decompression."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from urllib.parse import urlsplit

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.net.http.answers import AnswerHeads, AnswerReader
from vllm_fleet.net.http.client_connection import ClientConnection, Origin
from vllm_fleet.net.http.encoding import encode_lines
from vllm_fleet.net.http.messages import Unreachable


class Asked:
    """One question; use as ``async with``. Leaving the block ends it: a rest of the answer is not waited for.

    ``status`` and ``headers`` are there inside the block; ``headers`` may be shared with other answers: not changed.
    """

    __slots__ = ("_connection", "_fresh", "_origin", "_pool", "_question", "_reader", "headers", "status")

    def __init__(self, pool: Pool, origin: Origin, question: bytes, reader: AnswerReader, fresh: bool) -> None:
        self._pool, self._origin, self._question, self._reader, self._fresh = pool, origin, question, reader, fresh
        self._connection: ClientConnection | None = None
        self.status = 0
        self.headers: list[tuple[str, str]] = []

    async def __aenter__(self) -> Asked:
        """Wait for the answer's head.

        Raises:
            Unreachable, BrokenOff, NotHttp: there is none.
        """
        connection = None if self._fresh else self._pool.idle(self._origin)
        if connection is None:
            connection = await self._pool.connect(self._origin)
        self._connection, reader = connection, self._reader
        try:
            connection.ask(self._question, reader)
            while reader.head is None:
                await connection.wait()
        except BaseException:
            connection.cut()
            raise
        self.status, self.headers = reader.head.status, reader.head.pairs
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:  # fmt: skip
        if self._connection is not None:
            self._connection.release()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; the server is made to wait for a reader that is slower.

        Raises:
            BrokenOff, NotHttp: the connection ended before the body did.
        """
        connection, reader = self._connection, self._reader
        assert connection is not None, "the body is read inside the block"
        while True:
            if reader.parts:
                data = reader.parts[0] if len(reader.parts) == 1 else b"".join(reader.parts)
                reader.parts.clear()
                connection.taken()
                yield data
            elif reader.complete:
                return
            else:
                await connection.wait()

    async def read(self, bytes_max: int) -> bytes | None:
        """The whole body; None: it is longer than that. Raises as ``chunks``."""
        connection, reader = self._connection, self._reader
        assert connection is not None, "the body is read inside the block"
        kept: list[bytes] = []
        total = 0
        while True:
            if reader.parts:
                kept += reader.parts
                total += sum(map(len, reader.parts))
                reader.parts.clear()
                connection.taken()
                if total > bytes_max:
                    return None
            elif reader.complete:
                return kept[0] if len(kept) == 1 else b"".join(kept)
            else:
                await connection.wait()


class Pool:
    """Kept connections to any number of servers. Belongs to one event loop; ``close`` it at the end."""

    def __init__(self, *, connect_s: float, idle_s: float) -> None:
        self._connect_s, self._idle_s = connect_s, idle_s
        self._idle: dict[Origin, list[ClientConnection]] = {}
        self._open: set[ClientConnection] = set()
        self._heads = AnswerHeads()
        self._known: dict[tuple[str, str], tuple[Origin, bytes]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def ask(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None, *, fresh: bool = False
    ) -> Asked:
        """A question to ``url``, which is ``http://host:port/path`` or ``unix:/path/of/socket:/path``.

        ``fresh``: over a connection that was never used before.

        Raises:
            BadRequest: the URL is neither.
        """
        known = self._known.get((method, url)) or self._learn(method, url)
        origin, first = known
        length = b"" if body is None else b"Content-Length: %d\r\n" % len(body)
        question = b"%b%b%b\r\n%b" % (first, encode_lines(list(headers.items())), length, body or b"")
        return Asked(self, origin, question, AnswerReader(self._heads, to_head=method == "HEAD"), fresh)

    def idle(self, origin: Origin) -> ClientConnection | None:
        """An idle connection, the last used first; it is the caller's then."""
        kept = self._idle.get(origin)
        if not kept:
            return None
        connection = kept.pop()
        if connection.closed:
            return self.idle(origin)
        if asyncio.get_running_loop().time() - connection.idle_since > self._idle_s:
            connection.cut()  # and so are all below it: the sweep closes them
            return None
        return connection

    async def connect(self, origin: Origin) -> ClientConnection:
        """A new connection.

        Raises:
            Unreachable: refused, or not there within ``connect_s``.
        """
        loop = asyncio.get_running_loop()
        host, port = origin
        connection = ClientConnection(self, origin)
        if self._closed:
            raise Unreachable("the pool is closed")
        try:
            async with asyncio.timeout(self._connect_s):
                if port:
                    await loop.create_connection(lambda: connection, host, port)
                else:
                    await loop.create_unix_connection(lambda: connection, host)
        except TimeoutError as error:
            raise Unreachable(f"{host}:{port} did not take a connection within {self._connect_s} s") from error
        except OSError as error:
            raise Unreachable(f"cannot connect to {host}:{port}: {error.strerror or error}") from error
        self._open.add(connection)
        if connection.closed:  # it was lost before this task went on
            self._open.discard(connection)
            raise Unreachable(f"{host}:{port} took a connection and closed it")
        return connection

    async def close(self) -> None:
        """Close every connection at once."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.cut()
        self._idle.clear()
        await asyncio.sleep(0)

    def counts(self) -> tuple[int, int]:
        """Connections that are open, and how many of them are idle."""
        return len(self._open), sum(map(len, self._idle.values()))

    # From connections ------------------------------------------------------------------------------------------------

    def on_idle(self, connection: ClientConnection) -> None:
        """It can be asked again."""
        if self._closed:
            connection.cut()
            return
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._idle_s, self._sweep)

    def on_lost(self, connection: ClientConnection) -> None:
        """It is closed."""
        self._open.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._idle[connection.origin].remove(connection)

    def _sweep(self) -> None:
        """Close what has been idle for too long; a list's oldest are first."""
        loop = asyncio.get_running_loop()
        self._sweeper = None
        for origin, kept in list(self._idle.items()):
            late = [one for one in kept if loop.time() - one.idle_since > self._idle_s]
            for connection in late:
                kept.remove(connection)
                connection.cut()
            if not kept:
                del self._idle[origin]
        if self._idle:
            self._sweeper = loop.call_later(self._idle_s / 2, self._sweep)

    def _learn(self, method: str, url: str) -> tuple[Origin, bytes]:
        if url.startswith("unix:"):
            path, _, target = url.removeprefix("unix:").rpartition(":")
            origin, host = (path, 0), "localhost"
        else:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname:
                raise BadRequest(f"{url[: limits.URL_LEN_MAX]!r} is no http:// URL")
            origin, host = (parts.hostname, parts.port or 80), parts.netloc.rpartition("@")[2]
            target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        first = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n"
        if first.count("\n") != 2 or first.count("\r") != 2 or first.count(" ") != 3 or not first.isascii():
            raise BadRequest(f"{url[: limits.URL_LEN_MAX]!r} cannot be asked for")
        if len(self._known) >= limits.HTTP_HEADS_KEPT:
            self._known.clear()
        self._known[method, url] = found = (origin, first.encode())
        return found
