"""A small HTTP server that speaks like one vLLM instance, with faults on demand. It proves router logic, no more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web

from tests.sim.router_model import Stream
from vllm_fleet.core.env import RealEnv
from vllm_fleet.net.sockets import listen
from vllm_fleet.router.app import OnEvent, Router, running
from vllm_fleet.router.front import Front
from vllm_fleet.router.policies.settings import PolicySettings
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.wire.control import Member, Snapshot, State
from vllm_fleet.wire.names import Role
from vllm_fleet.wire.ticket import WorkerAddress

Fault = Literal[
    "",
    "status",
    "drop",
    "die_before_event",
    "die_mid_stream",
    "die_mid_body",
    "no_done",
    "slow",
    "silent",
    "plain_error",
]


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
    workers: tuple[WorkerAddress, ...] = ()
    """Not empty: handoffs from here are streamed."""
    gate: asyncio.Event | None = None
    """Until it is set, requests are taken and not answered; a stream sends its response headers, as vLLM does."""
    stream_gate: asyncio.Event | None = None
    """Until it is set, a stream stops after its first part."""
    writes: bool = False
    """Streams are answers of tests.sim's model, which gives the same tokens everywhere, instead of ``stream``."""
    dies_after: int | None = None
    """Parts of a stream after which the connection is cut; further requests are answered."""
    stalls_after: int | None = None
    """Parts of a stream after which nothing comes any more."""
    retry_after: str = ""
    """Told with an error's status."""
    headers_out: int = 0
    """Streams whose response headers were sent."""
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
            workers=self.workers,
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
        streamed = bool(body.get("stream"))
        if self.gate is not None and (not streamed or self.fault in ("status", "plain_error", "drop")):
            await self.gate.wait()
        if self.fault == "status":
            error = {"message": "mock says no", "type": "BadRequestError", "param": None, "code": self.status}
            told = {"retry-after": self.retry_after} if self.retry_after else {}
            return web.json_response({"error": error}, status=self.status, headers=told)
        if self.fault == "plain_error":
            return web.Response(status=self.status, text="Internal Server Error")
        if self.fault == "drop":
            _cut(request)
            return web.Response()
        if self.fault == "silent":
            await asyncio.sleep(60)
        if streamed:
            return await self._stream(request, self.gate)
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

    async def _stream(self, request: web.Request, gate: asyncio.Event | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        self.headers_out += 1
        if gate is not None:
            await gate.wait()
        if self.fault == "die_before_event":
            await response.write(b'data: {"half')
            _cut(request)
            return response
        if self.fault == "die_mid_stream":
            await response.write(self.stream[0] + b'data: {"half')
            await asyncio.sleep(0.05)
            _cut(request)
            return response
        if self.writes:
            return await self._write_stream(request, response)
        for part in self.stream[:-1] if self.fault == "no_done" else self.stream:
            await response.write(part)
            await asyncio.sleep(30 if self.fault == "slow" else 0.01)
            if self.stream_gate is not None:
                await self.stream_gate.wait()
        await response.write_eof()
        return response

    async def _write_stream(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        body, request_id = await request.json(), request.headers["x-request-id"]
        for number, part in enumerate(Stream(request.path, body, request_id, random.Random(0)).events()):
            if number == self.dies_after:
                self.dies_after = None
                _cut(request)
                return response
            if number == self.stalls_after:
                self.stalls_after = None
                await asyncio.sleep(60)
            await response.write(part)
            if self.stream_gate is not None:
                await self.stream_gate.wait()
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
TOKEN = bytes(range(32))


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
    *instances: MockInstance,
    request_timeout_s: float = 5.0,
    stop_s: float = 0.0,
    members: tuple[Member, ...] = (),
    streamed: bool = True,
    front: Front | None = None,
    admin: bool = False,
    rules: RequestRules = RequestRules(),  # noqa: B008  a constant
    policy: PolicySettings = PolicySettings(),  # noqa: B008  a constant
) -> AsyncIterator[Fleet]:
    """A router in front of ``instances``; in the end nothing it started runs any more.

    ``admin``: metrics and timelines are served at an address of their own.
    """
    async with contextlib.AsyncExitStack() as stack:
        for instance in instances:
            await stack.enter_async_context(serving(instance))
        known = (*(instance.member() for instance in instances), *members)

        async def watch(on_event: OnEvent) -> None:
            on_event(Snapshot("c", 1, known))
            await asyncio.Event().wait()

        listener = stack.enter_context(listen("127.0.0.1", 0, setting="test"))
        router = await stack.enter_async_context(
            running(
                *(listener, watch, RealEnv(), request_timeout_s, TOKEN),
                streamed=streamed,
                rules=rules,
                policy=policy,
                stop_s=stop_s,
                front=front,
                admin=stack.enter_context(listen("127.0.0.1", 0, setting="test")) if admin else None,
            )
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        await asyncio.sleep(0)
        yield Fleet(router, http)
        await until(lambda: all(instance.running == 0 for instance in instances if not instance.fault))
    assert asking() == [], "requests to instances outlive the router"


def asking() -> list[str]:
    """Requests to instances that run as tasks of their own, as "stage id"."""
    names = [task.get_name() for task in asyncio.all_tasks() if not task.done()]
    return sorted(name for name in names if name.startswith(("prefill ", "decode ")))


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not done():  # noqa: ASYNC110  mocks and metrics have no event to wait for
            await asyncio.sleep(0.01)


def streaming_pair() -> tuple[MockInstance, MockInstance]:
    """A pair whose handoffs are streamed."""
    p, d = pair()
    p.workers = (WorkerAddress("127.0.0.1", 5000), WorkerAddress("127.0.0.1", 5001))
    return p, d


def pair() -> tuple[MockInstance, MockInstance]:
    return MockInstance("p", "prefill"), MockInstance("d", "decode")
