"""The router's HTTP server, with aiohttp: paths, limits, and the client's side of each request."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import traceback
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.router import headers, problem
from vllm_fleet.router.call import Call
from vllm_fleet.router.exchange import Exchange
from vllm_fleet.router.fleet_view import FleetView, fleet_health
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.models import Models
from vllm_fleet.router.openai import Route, parse_request
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.reply import ClientGone
from vllm_fleet.router.timeline import Timelines

_CLIENT_GONE = 499  # in metrics only
_KEEPALIVE_S = 75.0
_BACKLOG = 1024
_TIMELINES = "/fleet/v1/requests/"

_Handler = Callable[[web.Request, str, float], Awaitable[web.StreamResponse]]


class _Refused(Exception):
    """The request ends here, with this problem."""

    def __init__(self, reason: Problem) -> None:
        super().__init__(reason.code)
        self.reason = reason


class ClientSink:
    """A client's connection, as a place for one answer."""

    def __init__(self, request: web.Request, request_id: str) -> None:
        self._request, self._request_id = request, request_id
        self.response: web.StreamResponse | None = None

    async def start(self, status: int, pairs: headers.Pairs, length: int | None) -> None:
        response = web.StreamResponse(status=status)
        for name, value in pairs:
            response.headers.add(name, value)
        response.headers[headers.REQUEST_ID] = self._request_id
        if length is not None:
            response.content_length = length
        self.response = response
        try:
            await response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGone from error

    async def write(self, data: bytes) -> None:
        assert self.response is not None, "an answer is started before it is written"
        try:
            await self.response.write(data)
        except ConnectionError as error:
            raise ClientGone from error

    def abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()


class Server:
    """Everything a client of the router can reach."""

    def __init__(
        self,
        view: FleetView,
        exchange: Exchange,
        models: Models,
        metrics: Metrics,
        env: Env,
        request_timeout_s: float,
        secret: str,
    ) -> None:
        """``secret`` is what an operator's ``Authorization: Bearer`` must say."""
        self._authorization, self._timelines = f"Bearer {secret}".encode(), Timelines()
        self._view, self._exchange, self._models = view, exchange, models
        self._metrics, self._env, self._request_timeout_s = metrics, env, request_timeout_s
        self._runner: web.AppRunner | None = None
        self._routes: dict[str, tuple[str, _Handler]] = {
            Route.COMPLETIONS.value: ("POST", self._generate),
            Route.CHAT.value: ("POST", self._generate),
            "/v1/models": ("GET", self._list_models),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._show_metrics),
            _TIMELINES: ("GET", self._show_timeline),
        }

    async def start(self, listener: socket.socket) -> None:
        """Serve on a listening socket."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._dispatch)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,  # a client that hangs up cancels its request, and so the work at instances
            keepalive_timeout=_KEEPALIVE_S,
            max_field_size=limits.HEADER_BYTES_MAX,
            max_headers=limits.HEADERS_MAX,
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        await web.SockSite(self._runner, listener, backlog=_BACKLOG).start()

    async def stop(self, seconds: float) -> None:
        """Take no new requests; running ones get ``seconds``, then an error.

        Whoever comes meanwhile is told so (503 and when to try again) instead of finding nobody.
        """
        if self._runner is None:
            return
        self._exchange.stop(seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + 2.0):
                await self._exchange.idle.wait()
        for site in list(self._runner.sites):
            await site.stop()
        await self._runner.cleanup()
        self._runner = None

    async def _dispatch(self, request: web.Request) -> web.StreamResponse:
        began = self._env.now()
        path = request.rel_url.raw_path
        if path.startswith(_TIMELINES):
            path = _TIMELINES
        request_id = headers.request_id(request.headers.get(headers.REQUEST_ID), self._env.new_id())
        status = _CLIENT_GONE
        try:
            try:
                response = await self._find(request, path)(request, request_id, began)
            except _Refused as refused:
                response = _problem_response(refused.reason, request_id)
            if self._exchange.stopping and not response.prepared:
                response.force_close()  # the next request must find another router
            status = response.status
            return response
        except ClientGone:
            return web.Response(status=_CLIENT_GONE)  # goes nowhere; aiohttp wants one
        except Exception as error:  # noqa: BLE001  the outermost loop: one bad request must not end the others
            status = 500
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            log.event("router.bug", level=logging.ERROR, error=type(error).__name__, at=at, request=request_id)
            if request.transport is not None and request.writer is not None and request.writer.output_size:
                request.transport.abort()
            return _problem_response(problem.internal(), request_id)
        finally:
            self._metrics.requests.labels(path if path in self._routes else "other", str(status)).inc()

    def _find(self, request: web.Request, path: str) -> _Handler:
        size = sum(len(name) + len(value) for name, value in request.raw_headers)
        if size > limits.HEADER_BYTES_MAX:
            raise _Refused(problem.headers_too_large(limits.HEADER_BYTES_MAX))
        if path not in self._routes:
            raise _Refused(problem.unknown_path(path))
        method, handler = self._routes[path]
        if request.method != method and not (request.method == "HEAD" and method == "GET"):
            raise _Refused(problem.wrong_method(request.method, path, method))
        return handler

    async def _generate(self, request: web.Request, request_id: str, began: float) -> web.StreamResponse:
        if self._exchange.stopping:
            raise _Refused(problem.stopping())
        if self._exchange.live >= limits.REQUESTS_MAX:
            raise _Refused(problem.overloaded())
        deadline = Deadline.after(self._request_timeout_s, "router.request_timeout_s")
        body = await self._body(request, deadline)
        try:
            parsed = parse_request(Route(request.rel_url.raw_path), body)
        except BadRequest as error:
            raise _Refused(problem.invalid_json(str(error))) from None
        self._metrics.request_bytes.inc(len(body))
        if parsed.dropped:
            self._metrics.dropped.inc()
        sink = ClientSink(request, request_id)
        timeline = self._timelines.begin(request_id, parsed.route.value, began)
        await self._exchange.run(Call(parsed, request.headers, request_id, began, deadline, timeline), sink)
        assert sink.response is not None, "a request ended without an answer"
        return sink.response

    async def _body(self, request: web.Request, deadline: Deadline) -> bytes:
        if headers.media_type(request.headers.get("content-type", "")) != problem.JSON:
            raise _Refused(problem.media_type())
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Refused(problem.media_type())
        bytes_max = limits.REQUEST_BODY_BYTES_MAX
        if (request.content_length or 0) > bytes_max:
            raise _Refused(problem.too_large(bytes_max))
        body = bytearray()
        try:
            async with asyncio.timeout(deadline.remaining()):
                async for chunk in request.content.iter_any():
                    body += chunk
                    if len(body) > bytes_max:
                        raise _Refused(problem.too_large(bytes_max))
        except TimeoutError:
            raise _Refused(problem.deadline(self._request_timeout_s)) from None
        except (ConnectionError, web.RequestPayloadError) as error:
            raise ClientGone from error
        return bytes(body)

    async def _list_models(self, request: web.Request, request_id: str, began: float) -> web.StreamResponse:
        found = await self._models.get(request.headers, request_id)
        if isinstance(found, Problem):
            raise _Refused(found)
        return _bytes_response(found.status, found.body, request_id, found.content_type)

    async def _health(self, request: web.Request, request_id: str, began: float) -> web.StreamResponse:
        can_answer, facts = fleet_health(self._view, self._env.now())
        if self._exchange.stopping:
            can_answer, facts = False, {**facts, "status": "stopping"}
        return _bytes_response(200 if can_answer else 503, msgspec.json.encode(facts), request_id)

    async def _show_metrics(self, request: web.Request, request_id: str, began: float) -> web.StreamResponse:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return _bytes_response(200, self._metrics.text(), request_id, content_type)

    async def _show_timeline(self, request: web.Request, request_id: str, began: float) -> web.StreamResponse:
        given = request.headers.get("authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, self._authorization):
            raise _Refused(problem.not_authorized())
        asked = request.rel_url.path.removeprefix(_TIMELINES)
        found = self._timelines.get(asked)
        if found is None:
            raise _Refused(problem.unknown_request(asked))
        return _bytes_response(200, msgspec.json.encode(found.facts()), request_id)


def _problem_response(reason: Problem, request_id: str) -> web.Response:
    response = _bytes_response(reason.status, reason.body(), request_id)
    response.headers.update(reason.headers)
    return response


def _bytes_response(status: int, body: bytes, request_id: str, content_type: str = problem.JSON) -> web.Response:
    return web.Response(
        status=status, body=body, headers={"content-type": content_type, headers.REQUEST_ID: request_id}
    )
