"""What a client of the router can reach: paths, checks, and its side of each request. Knows no sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import traceback
from collections.abc import Coroutine

from prometheus_client import Counter

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.net.http.messages import Answer, Handled, PeerLeft, Request, Speaker
from vllm_fleet.net.http.server import HttpServer
from vllm_fleet.net.http.writer import Writer
from vllm_fleet.router import headers, problem
from vllm_fleet.router.call import Call
from vllm_fleet.router.exchange import Exchange
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.front import Front
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.models import Models
from vllm_fleet.router.observer import CLIENT_GONE, Observer
from vllm_fleet.router.openai import Route, parse_request
from vllm_fleet.router.operators import HEALTH, OPERATORS_PATHS, TIMELINES, Operators, problem_answer
from vllm_fleet.router.pages import Pages
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.reply import ClientGone
from vllm_fleet.router.rules import router_rules
from vllm_fleet.router.siblings import Siblings
from vllm_fleet.router.tenants import ANYBODY, NO_KEY
from vllm_fleet.router.timeline import Timeline, Timelines

_READ_ANYWAY_BYTES = 64 << 10  # a body no longer than this is read even if it is refused: the connection can be kept
_GENERATE = {route.value: route for route in Route}
_MODELS = "/v1/models"
_METHODS_OF_CLIENTS = dict.fromkeys(_GENERATE, "POST") | dict.fromkeys((_MODELS, HEALTH), "GET")
_METHODS = _METHODS_OF_CLIENTS | dict.fromkeys(OPERATORS_PATHS, "GET")


class ClientSink:
    """A client's connection, as a place for one answer."""

    __slots__ = ("_request_id", "_writer")

    def __init__(self, writer: Writer, request_id: str) -> None:
        self._writer, self._request_id = writer, request_id

    async def start(self, status: int, pairs: headers.Pairs, length: int | None) -> None:
        try:
            self._writer.start(status, [*pairs, (headers.REQUEST_ID, self._request_id)], length)
        except PeerLeft as error:
            raise ClientGone from error

    async def write(self, data: bytes) -> None:
        writer = self._writer
        try:
            writer.write(data)
            if writer.behind:
                await writer.drain()
        except PeerLeft as error:
            raise ClientGone from error

    def abort(self) -> None:
        self._writer.abort()


class Generation(Speaker):
    """A request that instances answer."""

    __slots__ = ("_request", "_server", "_tenant", "_timeline")

    def __init__(self, server: Server, request: Request, timeline: Timeline, tenant: str) -> None:
        self._server, self._request, self._timeline, self._tenant = server, request, timeline, tenant

    async def speak(self, writer: Writer) -> None:
        server, timeline, status = self._server, self._timeline, CLIENT_GONE
        request_id = timeline.request_id
        try:
            refused = await server.generate(self._request, timeline, self._tenant, writer)
            if refused is not None:
                _say(writer, problem_answer(refused, request_id))
            status = writer.status or 500
        except (ClientGone, PeerLeft) as error:
            raise PeerLeft(str(error)) from error
        except Exception as error:  # noqa: BLE001  the outermost loop: one bad request must not end the others
            status = 500
            log_bug(error, request_id)
            if writer.status is not None:
                writer.abort()
            else:
                _say(writer, problem_answer(problem.internal(), request_id))
        finally:
            server.ended(timeline.route, status, request_id, self._tenant, timeline.received, timeline)


class Server:
    """Everything a client of the router can reach; a Service of net/http."""

    def __init__(
        self,
        view: FleetView,
        exchange: Exchange,
        models: Models,
        metrics: Metrics,
        env: Env,
        request_timeout_s: float,
        secret: str,
        siblings: Siblings | None = None,
        front: Front | None = None,
        *,
        operators_here: bool = True,
    ) -> None:
        """``secret`` is what an operator's ``Authorization: Bearer`` must say. ``operators_here``: their pages are
        served where the clients are; if not, only /health is.
        """
        self._front = front if front is not None else Front(Observer(env))
        self._methods = _METHODS if operators_here else _METHODS_OF_CLIENTS
        self._timelines, self._exchange, self._models = Timelines(), exchange, models
        self._metrics, self._env, self._request_timeout_s = metrics, env, request_timeout_s
        self._counted: dict[tuple[str, int], Counter] = {}
        self.pages = Pages(view, exchange, metrics, self._timelines, env)
        self.operators = Operators(self.pages, secret, siblings)
        self._http = HttpServer(self, router_rules(), self._explain)

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve on a listening socket."""
        await self._http.start(listener, tls)
        self._http.keep_sweeping()

    async def stop(self, seconds: float) -> None:
        """Take no new requests; running ones get ``seconds``, then an error.

        Whoever comes meanwhile is told so (503 and when to try again) instead of finding nobody.
        """
        self._exchange.stop(seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + 2.0):
                await self._exchange.idle.wait()
        await self._http.close(1.0)

    # The HTTP layer's questions --------------------------------------------------------------------------------------

    def refuse(self, request: Request) -> Answer | None:
        """See Service. A short body is read all the same, so that the next request can follow it."""
        length = request.head.length if request.head is not None else 0
        if length is not None and length <= _READ_ANYWAY_BYTES:
            return None
        refused, _ = self._refused(request)
        if refused is None:
            return None
        request_id = self._env.new_id()
        self.ended("other", refused.status, request_id, "", self._env.now())
        return problem_answer(refused, request_id)

    def handle(self, request: Request) -> Handled:
        """See Service."""
        began, path = self._env.now(), request.path
        if path.startswith(TIMELINES):
            path = TIMELINES
        inner_id = self._env.new_id()
        request_id = headers.request_id(request.text().get(headers.REQUEST_ID), inner_id)
        if self._exchange.stopping:
            request.keep_alive = False  # the next request must find another router
        refused, tenant = self._refused(request)
        if refused is not None:
            route = "other" if refused.status == 404 else path
            self.ended(route, refused.status, request_id, tenant, began)
            return problem_answer(refused, request_id)
        if path in _GENERATE:
            timeline = self._timelines.begin(request_id, path, began)
            timeline.inner_id, timeline.tenant = inner_id, tenant
            timeline.trace = self._front.observer.traced(request.text())
            return Generation(self, request, timeline, tenant)
        if path == _MODELS:
            return self._later(self._list_models(request, request_id), _MODELS, request_id, tenant, began)
        answered = self.operators.handle(request, request_id)
        if isinstance(answered, Answer):
            self.ended(path, answered.status, request_id, tenant, began)
            return answered
        return self._later(answered, path, request_id, tenant, began)

    def ended(
        self, route: str, status: int, request_id: str, tenant: str, began: float, timeline: Timeline | None = None
    ) -> None:
        """A request of ``route`` was answered."""
        self._front.observer.ended(route if route in _METHODS else "other", status, request_id, tenant, began, timeline)
        counted = self._counted.get((route, status))
        if counted is None:
            counted = self._metrics.requests.labels(route if route in _METHODS else "other", str(status))
            self._counted[route, status] = counted
        counted.inc()

    def _explain(self, status: int, code: str, text: str) -> Answer:
        """See net.http.messages.Explain."""
        request_id = self._env.new_id()
        self.ended("other", status, request_id, "", self._env.now())
        match status:
            case 413:
                reason = problem.too_large(limits.REQUEST_BODY_BYTES_MAX)
            case 431:
                reason = problem.headers_too_large(limits.HEADER_BYTES_MAX)
            case _:
                reason = Problem(status, code, f"The request cannot be read: {text}.")
        return problem_answer(reason, request_id)

    async def _later(
        self, work: Coroutine[None, None, Answer], route: str, request_id: str, tenant: str, began: float
    ) -> Answer:
        status = CLIENT_GONE
        try:
            answer = await work
            status = answer.status
        except Exception as error:  # noqa: BLE001  as above
            log_bug(error, request_id)
            status, answer = 500, problem_answer(problem.internal(), request_id)
        finally:
            self.ended(route, status, request_id, tenant, began)
        return answer

    # What is served --------------------------------------------------------------------------------------------------

    async def generate(self, request: Request, timeline: Timeline, tenant: str, writer: Writer) -> Problem | None:
        """Answer through the exchange; or why not, where nothing has been answered."""
        if self._exchange.stopping:
            return problem.stopping()
        if self._exchange.live >= limits.REQUESTS_MAX:
            return problem.overloaded()
        try:
            parsed = parse_request(_GENERATE[timeline.route], request.body)
        except BadRequest as error:
            return problem.invalid_json(str(error))
        if (refused := self._front.salt(parsed.fields, tenant)) is not None:
            return refused
        timeline.bytes_in = len(request.body)
        self._metrics.request_bytes.inc(timeline.bytes_in)
        if parsed.dropped:
            self._metrics.dropped.inc()
        request.body = b""  # its fields hold what is needed of it
        deadline = Deadline.after(self._request_timeout_s, "router.request_timeout_s")
        inner = self._front.inner_headers(request.text())
        call = Call(parsed, inner, timeline.request_id, timeline.received, deadline, timeline, tenant)
        await self._exchange.run(call, ClientSink(writer, timeline.request_id))
        return None

    async def _list_models(self, request: Request, request_id: str) -> Answer:
        found = await self._models.get(self._front.inner_headers(request.text()), request_id)
        if isinstance(found, Problem):
            return problem_answer(found, request_id)
        return Answer(found.status, found.body, found.content_type, ((headers.REQUEST_ID, request_id),))

    def _refused(self, request: Request) -> tuple[Problem | None, str]:
        """Why the request's head alone is enough to refuse it, and whose it is."""
        path = TIMELINES if request.path.startswith(TIMELINES) else request.path
        method = self._methods.get(path)
        tenant: str | None = ANYBODY
        if path not in OPERATORS_PATHS or method is None:
            tenant = self._front.tenants.of(request.text())
        if tenant is None:
            self._front.turned_away(request.peer, self._env.now())
            return NO_KEY, ANYBODY  # who has none is not told what there is
        return _wrong_head(request, path, method), tenant


def log_bug(error: Exception, request_id: str) -> None:
    """A fault of ours, with the place but without values."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
    log.event("router.bug", level=logging.ERROR, error=type(error).__name__, at=at, request=request_id)


def _wrong_head(request: Request, path: str, method: str | None) -> Problem | None:
    if method is None:
        return problem.unknown_path(request.path)
    if request.method != method and not (request.method == "HEAD" and method == "GET"):
        return problem.wrong_method(request.method, path, method)
    if method == "POST":
        text = request.text()
        given = text.get("content-type", "")
        if given != problem.JSON and headers.media_type(given) != problem.JSON:
            return problem.media_type()
        if text.get("content-encoding", "identity").lower() != "identity":
            return problem.media_type()
    return None


def _say(writer: Writer, answer: Answer) -> None:
    writer.start(answer.status, [("content-type", answer.content_type), *answer.headers], len(answer.body))
    writer.write(answer.body)
