"""The controller's server: puts the API, its guard and the HTTP layer together around an engine."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine, Iterable

import msgspec

from vllm_fleet.controller.api import MembersApi
from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.exchange import refusal
from vllm_fleet.controller.groups_api import GroupsApi
from vllm_fleet.controller.guard import Guard
from vllm_fleet.controller.http import http_server
from vllm_fleet.controller.openapi import document
from vllm_fleet.controller.routes import NoRoute, Route, Routes
from vllm_fleet.controller.wishes_api import WishesApi
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest, Busy, NotLeader
from vllm_fleet.net.http.messages import Answer, Handled, Request

STOP_S = 0.5
SWEEP_S = 0.25


class Front:
    """What the HTTP layer asks: the guard, then the handler of the route; failures become typed answers."""

    def __init__(self, routes: Iterable[Route], bearer: str, own_host: str, env: Env) -> None:
        self.routes = Routes([*routes, Route("GET", "/openapi.json", self.openapi, {200: "application/json"})])
        self._guard = Guard(bearer, own_host, [route.path for route in self.routes.all if not route.needs_token], env)
        self._document = Answer(body=msgspec.json.encode(document(self.routes)))
        self.refuse = self._guard.refuse

    def openapi(self, request: Request) -> Handled:
        """This document."""
        return self._document

    def handle(self, request: Request) -> Handled:
        """See exchange.Service."""
        found = self.routes.find(request.method, request.path)
        if isinstance(found, NoRoute):
            if not found.allowed:
                return refusal(404, "not_found", f"{request.method}: there is no such path")
            allow = ", ".join(found.allowed)
            return refusal(405, "method_not_allowed", f"this path is for {allow}", allow=allow)
        route, request.params = found
        try:
            handled = route.handler(request)
        except Exception as error:  # noqa: BLE001 - outermost loop: one bad request must not end the controller
            return _failure(error)
        return _later(handled) if isinstance(handled, Coroutine) else handled


async def _later(handled: Coroutine[None, None, Answer]) -> Answer:
    try:
        return await handled
    except Exception as error:  # noqa: BLE001 - as above
        return _failure(error)


def _failure(error: Exception) -> Answer:
    if isinstance(error, NotLeader):
        return refusal(503, "not_leader", str(error), leader=error.leader)
    if isinstance(error, Busy):
        return refusal(503, "busy", str(error))
    if isinstance(error, BadRequest):
        return refusal(400, "bad_request", str(error))
    log.event("controller.bug", level=logging.ERROR, kind=type(error).__name__, reason=str(error))
    return refusal(500, "bug", "the controller failed on this request; its log says why")


class ControllerServer:
    """Serves ``engine`` on a listening socket."""

    def __init__(self, engine: Engine, bearer: str, own_host: str, env: Env) -> None:
        self._engine = engine
        self._groups = GroupsApi(engine, env)
        routes = [*MembersApi(engine).routes(), *WishesApi(engine).routes(), *self._groups.routes()]
        self.front = Front(routes, bearer, own_host, env)
        self._http = http_server(self.front)
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on ``listener``, which this server then owns."""
        await self._http.start(listener)
        self._sweep()

    async def close(self) -> None:
        """End watch streams at once, give other requests STOP_S, and close everything."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._engine.watchers.end()
        self._groups.end()
        await self._http.close(STOP_S)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(SWEEP_S, self._sweep)
        now = loop.time()
        self._http.sweep(now)
        if not self._engine.leads():
            self._engine.watchers.dismiss()
        self._engine.watchers.reassure(self._engine.state.revision, now, limits.STILL_HERE_S - 2 * SWEEP_S)
