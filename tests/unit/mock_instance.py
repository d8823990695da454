"""A small HTTP server that speaks like one vLLM instance, with faults on demand. It proves router logic, no more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web

from vllm_fleet.core.env import RealEnv
from vllm_fleet.net.sockets import listen
from vllm_fleet.router.app import OnEvent, Router, running
from vllm_fleet.wire.control import Member, Snapshot, State
from vllm_fleet.wire.names import Role

Fault = Literal["", "status", "drop", "die_mid_stream", "die_mid_body", "no_done", "slow", "silent", "plain_error"]


@dataclass
class Seen:
    """One request that came in."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class MockInstance:
    """One instance; set ``fault`` to make it misbehave."""

    name: str
    role: Role
    url: str = ""
    fault: Fault = ""
    status: int = 500
    params: dict[str, Any] | None = field(default_factory=lambda: {"do_remote_prefill": True, "ticket": "t" * 9})
    stream: tuple[bytes, ...] = (b'data: {"n":1}\n\n', b'data: {"n":2}\n\n', b"data: [DONE]\n\n")
    metrics_page: str = ""
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    models_asked: int = 0

    def member(self, state: State = "ready", fingerprint: dict[str, str] | None = None, life: int = 1) -> Member:
        """This instance as the controller would tell it."""
        return Member(
            name=self.name,
            role=self.role,
            url=self.url,
            pid=1,
            incarnation=f"{self.name}-{life}",
            generation=life,
            state=state,
            fingerprint=fingerprint or {},
        )

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(Seen(request.path, body, {k.lower(): v for k, v in request.headers.items()}))
        self.running += 1
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.fault == "status":
            error = {"message": "mock says no", "type": "BadRequestError", "param": None, "code": self.status}
            return web.json_response({"error": error}, status=self.status)
        if self.fault == "plain_error":
            return web.Response(status=self.status, text="Internal Server Error")
        if self.fault == "drop":
            _cut(request)
            return web.Response()
        if self.fault == "silent":
            await asyncio.sleep(60)
        if body.get("stream"):
            return await self._stream(request)
        held = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
        answer: dict[str, Any] = {"id": "cmpl-mock", "choices": [{"text": f"from {self.name}", "index": 0}]}
        answer["kv_transfer_params"] = self.params if held else None
        if self.fault == "die_mid_body":
            response = web.StreamResponse(headers={"content-type": "application/json"})
            await response.prepare(request)
            await response.write(b'{"id": "cmpl')
            await asyncio.sleep(0.05)
            _cut(request)
            return response
        return web.json_response(answer, headers={"connection": "x-private", "x-private": "1", "x-kept": "1"})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        if self.fault == "die_mid_stream":
            await response.write(self.stream[0] + b'data: {"half')
            await asyncio.sleep(0.05)
            _cut(request)
            return response
        for part in self.stream[:-1] if self.fault == "no_done" else self.stream:
            await response.write(part)
            await asyncio.sleep(30 if self.fault == "slow" else 0.01)
        await response.write_eof()
        return response

    async def models(self, request: web.Request) -> web.Response:
        self.models_asked += 1
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics_page)


def _cut(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


@contextlib.asynccontextmanager
async def serving(instance: MockInstance, port: int = 0) -> AsyncIterator[MockInstance]:
    """Serve ``instance`` on a loopback port inside the block."""
    app = web.Application()
    app.router.add_post("/v1/completions", instance.generate)
    app.router.add_post("/v1/chat/completions", instance.generate)
    app.router.add_get("/v1/models", instance.models)
    app.router.add_get("/metrics", instance.metrics)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    with listen("127.0.0.1", port, setting="mock") as listener:
        instance.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        await web.SockSite(runner, listener).start()
        try:
            yield instance
        finally:
            await runner.cleanup()


# A router in front of mocks -----------------------------------------------------------------------------------------

JSON = {"content-type": "application/json"}


@dataclass
class Fleet:
    router: Router
    http: aiohttp.ClientSession

    async def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Any, dict[str, str]]:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.router.url + path, data=sent, headers={**JSON, **headers}) as answer:
            return answer.status, await answer.json(), {k.lower(): v for k, v in answer.headers.items()}

    async def get(self, path: str, method: str = "GET") -> tuple[int, str, dict[str, str]]:
        async with self.http.request(method, self.router.url + path) as answer:
            return answer.status, await answer.text(), {k.lower(): v for k, v in answer.headers.items()}

    async def stream(self, body: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
        sent = json.dumps({**body, "stream": True})
        async with self.http.post(f"{self.router.url}/v1/completions", data=sent, headers=JSON) as answer:
            return await answer.read(), {k.lower(): v for k, v in answer.headers.items()}

    def metric(self, line: str) -> float:
        found = [row for row in self.router.metrics.text().decode().splitlines() if row.startswith(line)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


@contextlib.asynccontextmanager
async def fleet(
    *instances: MockInstance, request_timeout_s: float = 5.0, stop_s: float = 0.0, members: tuple[Member, ...] = ()
) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        for instance in instances:
            await stack.enter_async_context(serving(instance))
        known = (*(instance.member() for instance in instances), *members)

        async def watch(on_event: OnEvent) -> None:
            on_event(Snapshot("c", 1, known))
            await asyncio.Event().wait()

        listener = stack.enter_context(listen("127.0.0.1", 0, setting="test"))
        router = await stack.enter_async_context(running(listener, watch, RealEnv(), request_timeout_s, stop_s))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        await asyncio.sleep(0)
        yield Fleet(router, http)
        assert not instances or all(instance.running == 0 for instance in instances if not instance.fault)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not done():  # noqa: ASYNC110  mocks and metrics have no event to wait for
            await asyncio.sleep(0.01)


def pair() -> tuple[MockInstance, MockInstance]:
    return MockInstance("p", "prefill"), MockInstance("d", "decode")
