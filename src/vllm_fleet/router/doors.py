"""Where one router process is reached: by clients, by its operators, and by the other workers."""

from __future__ import annotations

import socket
import ssl

from vllm_fleet.core import log
from vllm_fleet.core.env import Env
from vllm_fleet.router.admin import Admin
from vllm_fleet.router.http import Server
from vllm_fleet.router.rules import router_rules
from vllm_fleet.router.siblings import Siblings, WorkerDoor, open_door
from vllm_fleet.router.worker import Worker


class Doors:
    """``admin``: where metrics and timelines are served; None: on ``listener``, where the clients are."""

    def __init__(
        self, listener: socket.socket, admin: socket.socket | None, tls: ssl.SSLContext | None, worker: Worker | None
    ) -> None:
        self._listener, self._admin, self._tls, self._worker = listener, admin, tls, worker
        self.url = _url(listener, "http" if tls is None else "https")
        self.admin_url = self.url if admin is None else _url(admin, "http")
        self.operators_here = admin is None
        self.siblings = None if worker is None else Siblings(worker.other_sockets)
        self._operators: Admin | None = None
        self._inner: WorkerDoor | None = None

    async def open(self, server: Server, env: Env) -> None:
        """Take requests from now on; clients last."""
        if self._admin is not None:
            self._operators = Admin(server.operators, self._admin.getsockname()[0], router_rules(), env)
            await self._operators.start(self._admin)
        if self._worker is not None:
            self._inner = await open_door(self._worker, server.pages)
        await server.start(self._listener, self._tls)
        if self._worker is None:
            log.event("router.start", url=self.url, admin=self.admin_url)
        else:
            log.event("worker.start", worker=self._worker.index, url=self.url, admin=self.admin_url)

    async def close(self, server: Server, stop_s: float) -> None:
        """Clients first, politely for ``stop_s``; operators can watch meanwhile."""
        await server.stop(stop_s)
        if self._operators is not None:
            await self._operators.stop()
        if self._inner is not None:
            await self._inner.close()
        if self.siblings is not None:
            await self.siblings.close()


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
