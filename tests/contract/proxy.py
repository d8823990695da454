"""A TCP proxy in user space: delays, cuts, resets and crumbles what passes, and counts it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

CHUNK_BYTES = 64 << 10


@dataclass
class Conduct:
    """What the proxy does to connections; may be changed while it runs."""

    delay_s: float = 0.0
    chunk_bytes: int = CHUNK_BYTES
    """Bytes are passed on in pieces of at most so many, each sent by itself."""
    cut_after_bytes: int | None = None
    """Close both sides after so many bytes of the owner's."""
    reset: bool = False
    """... with RST instead of FIN."""


@dataclass
class Counts:
    """What has happened."""

    connections: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    """From the owner to the reader."""
    chunks: int = 0
    cuts: int = 0
    delayed_s: list[float] = field(default_factory=list)
    """How long each chunk was held back."""


class Proxy:
    """Listens on a port of its own and passes everything on to 127.0.0.1:``port``."""

    def __init__(self, port: int) -> None:
        self.conduct, self.counts = Conduct(), Counts()
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        self._ready.wait(5)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            server = await asyncio.start_server(
                lambda reader, writer: tasks.create_task(self._connection(reader, writer)), "127.0.0.1", 0
            )
            self.port = int(server.sockets[0].getsockname()[1])
            self._ready.set()
            await self._stop.wait()
            server.close()
            for writer in list(self._open):
                writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        self._open.add(writer)
        try:
            their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            self._open.discard(writer)
            return
        self._open.add(their_writer)
        for each in (writer, their_writer):
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, their_writer, down=False, other=writer))
                both.create_task(self._pass(their_reader, writer, down=True, other=their_writer))
        finally:
            for each in (writer, their_writer):
                self._open.discard(each)
                each.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool, other: asyncio.StreamWriter
    ) -> None:
        """One direction; ends both when its source ends."""
        waiting: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(4096)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._take(reader, waiting))
                both.create_task(self._give(writer, waiting, down, other))
        except* OSError:
            pass
        for each in (writer, other):
            each.transport.abort() if self.conduct.reset else each.close()

    async def _take(self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes] | None]) -> None:
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                await waiting.put((time.monotonic(), chunk))
        finally:
            await waiting.put(None)

    async def _give(
        self,
        writer: asyncio.StreamWriter,
        waiting: asyncio.Queue[tuple[float, bytes] | None],
        down: bool,
        other: asyncio.StreamWriter,
    ) -> None:
        while (item := await waiting.get()) is not None:
            arrived, received = item
            await asyncio.sleep(max(0.0, arrived + self.conduct.delay_s - time.monotonic()))
            self.counts.delayed_s.append(time.monotonic() - arrived)
            for start in range(0, len(received), self.conduct.chunk_bytes):
                chunk = received[start : start + self.conduct.chunk_bytes]
                limit = self.conduct.cut_after_bytes
                if down and limit is not None and self.counts.down_bytes + len(chunk) > limit:
                    self._cut(writer, other)
                    return
                writer.write(chunk)
                await writer.drain()
                self.counts.chunks += 1
                if down:
                    self.counts.down_bytes += len(chunk)
                else:
                    self.counts.up_bytes += len(chunk)

    def _cut(self, writer: asyncio.StreamWriter, other: asyncio.StreamWriter) -> None:
        self.counts.cuts += 1
        for each in (writer, other):
            if self.conduct.reset:
                raw = each.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.transport.abort()
            else:
                each.close()
