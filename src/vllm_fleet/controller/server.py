"""The controller's HTTP: a thin shell around the engine. The API is described in wire/control.py."""

from __future__ import annotations

import asyncio
import socket
from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from vllm_fleet.controller import reactor
from vllm_fleet.controller.effects import Reply
from vllm_fleet.controller.engine import Decide, Engine
from vllm_fleet.controller.guard import Guard, refusal
from vllm_fleet.controller.metrics import fleet_metrics
from vllm_fleet.controller.watchers import Watcher, encode_line, first_events
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest, Busy
from vllm_fleet.wire import control

COUNT_MAX = 2**63 - 1
STOP_S = 0.5

Message = TypeVar("Message", control.Register, control.Heartbeat)

_REGISTER = msgspec.json.Decoder(control.Register)
_HEARTBEAT = msgspec.json.Decoder(control.Heartbeat)


class Health(Struct, frozen=True):
    """The answer of /health. ``durable`` false: joins wait until the journal can be written again."""

    status: str
    durable: bool


class Api:
    """The handlers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/members", self.register),
            web.post("/v1/members/{name}/heartbeat", self.heartbeat),
            web.delete("/v1/members/{name}", self.deregister),
            web.get("/v1/members", self.members, allow_head=False),
            web.get("/v1/watch", self.watch, allow_head=False),
            web.get("/metrics", self.metrics, allow_head=False),
            web.get("/health", self.health, allow_head=False),
        ]

    async def register(self, request: web.Request) -> web.StreamResponse:
        message = await _body(request, _REGISTER)
        fingerprint_len = len(control.encode(message.fingerprint))
        if fingerprint_len > limits.FINGERPRINT_LEN_MAX:
            raise BadRequest(
                f"fingerprint is {fingerprint_len} bytes long, at most {limits.FINGERPRINT_LEN_MAX} may be"
            )
        return await self._answer(lambda state, now: reactor.on_register(state, message, now))

    async def heartbeat(self, request: web.Request) -> web.StreamResponse:
        message = await _body(request, _HEARTBEAT)
        name = request.match_info["name"]
        return await self._answer(lambda state, now: reactor.on_heartbeat(state, name, message, now))

    async def deregister(self, request: web.Request) -> web.StreamResponse:
        name, generation = request.match_info["name"], _count(request, "generation")
        if generation is None:
            raise BadRequest("generation: this parameter is needed")
        return await self._answer(lambda state, now: reactor.on_deregister(state, name, generation, now))

    async def members(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=control.encode(self._engine.state.snapshot()), content_type="application/json")

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        page = await fleet_metrics(self._engine.state.snapshot().members)
        return web.Response(text=page, content_type="text/plain", charset="utf-8")

    async def health(self, request: web.Request) -> web.StreamResponse:
        durable = self._engine.state.durable
        health = Health("ok" if durable else "not_durable", durable)
        return web.Response(body=control.encode(health), content_type="application/json")

    async def watch(self, request: web.Request) -> web.StreamResponse:
        """Stream changes until either side leaves. ``controller``: the journal that ``since`` is a revision of."""
        since = _count(request, "since")
        transport = request.transport
        if transport is None:
            raise Busy("the watcher left")
        watcher = Watcher(cut=transport.abort)
        self._engine.watchers.add(watcher)
        try:
            first = self._first_lines(since, request.query.get("controller"))  # no await between this and add
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
            await response.prepare(request)
            await self._stream(response, watcher, first)
            return response
        finally:
            self._engine.watchers.discard(watcher)

    def _first_lines(self, since: int | None, controller: str | None) -> bytes:
        events = first_events(self._engine.state, since, controller)
        return b"".join(map(encode_line, events)) or self._still_here()

    def _still_here(self) -> bytes:
        return control.encode(control.StillHere(self._engine.state.revision)) + b"\n"

    async def _stream(self, response: web.StreamResponse, watcher: Watcher, first: bytes) -> None:
        line: bytes | None = first
        try:
            while line is not None:
                async with asyncio.timeout(limits.WATCH_WRITE_S):
                    await response.write(line)
                try:
                    line = await watcher.next(limits.STILL_HERE_S)
                except TimeoutError:
                    line = self._still_here()
            async with asyncio.timeout(limits.WATCH_WRITE_S):
                await response.write_eof()
        except TimeoutError:
            log.warn("watcher.slow", write_s=limits.WATCH_WRITE_S)
            watcher.cut()
        except ConnectionError:
            pass  # the watcher left, or was cut off

    async def _answer(self, decide: Decide) -> web.StreamResponse:
        reply: Reply = await self._engine.submit(decide)
        if isinstance(reply.body, control.ErrorBody):
            return refusal(reply.status, reply.body.code, reply.body.error)
        if reply.body is None:
            return web.Response(status=reply.status)
        return web.Response(status=reply.status, body=control.encode(reply.body), content_type="application/json")


class ControllerServer:
    """Serves ``engine`` on a listening socket."""

    def __init__(self, engine: Engine, bearer: str, own_host: str, env: Env) -> None:
        guard = Guard(bearer, own_host, env)
        app = web.Application(middlewares=[guard.middleware], client_max_size=limits.CONTROL_BODY_BYTES_MAX)
        app.add_routes(Api(engine).routes())
        self._engine = engine
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_S)

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on ``listener``, which this server then owns."""
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def close(self) -> None:
        """End watch streams at once, give other requests STOP_S, and close everything."""
        self._engine.watchers.end()
        await self._runner.cleanup()


async def _body(request: web.Request, decoder: msgspec.json.Decoder[Message]) -> Message:
    try:
        async with asyncio.timeout(limits.CONTROL_BODY_S):
            body = await request.read()
        return decoder.decode(body)
    except TimeoutError as error:
        raise BadRequest(f"the body did not arrive within {limits.CONTROL_BODY_S} s") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not what it must be: {error}") from error


def _count(request: web.Request, name: str) -> int | None:
    """A query parameter that is a number, None when it is absent."""
    given = request.query.get(name)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 19 and int(given) <= COUNT_MAX):
        raise BadRequest(f"{name}: must be a whole number from 0 to {COUNT_MAX}")
    return int(given)
