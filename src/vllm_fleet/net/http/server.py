"""HTTP/1.1 on one listening socket. One sweep looks at every deadline: no connection has a timer of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from email.utils import formatdate

from vllm_fleet.net import sockets
from vllm_fleet.net.http.connection import Connection, Stage, allowed_s
from vllm_fleet.net.http.messages import Explain, Rules, Service
from vllm_fleet.net.http.reader import Heads

SWEEP_S = 0.25


class HttpServer:
    """Serves one Service. ``sweep`` must be called a few times a second: it ends what is late. ``keep_sweeping`` does.

    ``explain`` makes the answers to what cannot become a request.
    """

    def __init__(self, service: Service, rules: Rules, explain: Explain) -> None:
        self.service, self.rules, self.explain = service, rules, explain
        self.heads, self.allowed_s = Heads(rules.heads_kept), allowed_s(rules)
        self.date = b""
        self._open: set[Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._nobody = asyncio.Event()
        self._open_max = 0
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections on ``listener``, which this server then owns; may be called for several."""
        self._open_max = sockets.allow_many() - self.rules.files_kept
        self._tell_date()
        self._servers.append(await sockets.serve(listener, lambda: Connection(self), self.rules.backlog, tls))

    def keep_sweeping(self) -> None:
        """Sweep by itself from now on, until ``close``."""
        loop = asyncio.get_running_loop()
        self.sweep(loop.time())
        self._sweeper = loop.call_later(SWEEP_S, self.keep_sweeping)

    def sweep(self, now: float) -> None:
        """``now``: the event loop's time."""
        self._tell_date()
        for late in [one for one in self._open if one.wait_until <= now]:
            late.on_late(now)

    def stages(self) -> list[Stage]:
        """What each connection waits for."""
        return [one.stage for one in self._open]

    def stop_listening(self) -> None:
        """Take no new connections."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def close(self, patience_s: float) -> None:
        """Take nothing new, let what is under way end within ``patience_s``, and close everything."""
        self.stop_listening()
        for one in list(self._open):
            one.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self._open:
                    self._nobody.clear()
                    await self._nobody.wait()
        for one in list(self._open):
            one.cut()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.sleep(0)  # the loop tells them that they are lost

    def on_open(self, connection: Connection) -> bool:
        """See Home."""
        if len(self._open) >= min(self.rules.connections_max, self._open_max):
            return False
        self._open.add(connection)
        return True

    def on_lost(self, connection: Connection) -> None:
        """See Home."""
        self._open.discard(connection)
        if not self._open:
            self._nobody.set()

    def _tell_date(self) -> None:
        if self.rules.public:
            self.date = b"Date: %b\r\n" % formatdate(usegmt=True).encode()
