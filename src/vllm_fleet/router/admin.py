"""The operators' own door: health, metrics and timelines on an address of their own, and no browsers there."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Coroutine

from vllm_fleet.core.env import Env
from vllm_fleet.net.hosts import is_ours
from vllm_fleet.net.http.messages import Answer, Handled, Request, Rules
from vllm_fleet.net.http.server import HttpServer
from vllm_fleet.router import problem
from vllm_fleet.router.operators import OPERATORS_PATHS, TIMELINES, Operators, problem_answer
from vllm_fleet.router.problem import Problem

_BODY_BYTES_MAX = 1024  # nobody sends one


class Admin:
    """A Service of net/http."""

    def __init__(self, operators: Operators, own_host: str, rules: Rules, env: Env) -> None:
        self._operators, self._own_host, self._env = operators, own_host.lower(), env
        self._http = HttpServer(self, dataclasses.replace(rules, body_bytes_max=_BODY_BYTES_MAX), self._explain)

    async def start(self, listener: socket.socket) -> None:
        """Serve on a listening socket."""
        await self._http.start(listener)
        self._http.keep_sweeping()

    async def stop(self) -> None:
        """Serve no more."""
        await self._http.close(1.0)

    def refuse(self, request: Request) -> Answer | None:
        """See Service."""
        refused = self._refused(request)
        return None if refused is None else problem_answer(refused, self._env.new_id())

    def handle(self, request: Request) -> Handled:
        """See Service."""
        request_id = self._env.new_id()
        refused = self._refused(request)
        if refused is not None:
            return problem_answer(refused, request_id)
        answered = self._operators.handle(request, request_id)
        return answered if isinstance(answered, Answer) else self._later(answered, request_id)

    async def _later(self, work: Coroutine[None, None, Answer], request_id: str) -> Answer:
        try:
            return await work
        except Exception:  # noqa: BLE001  the outermost loop: a fault of ours is told as one
            return problem_answer(problem.internal(), request_id)

    def _refused(self, request: Request) -> Problem | None:
        hosts = request.values(b"host")
        if len(hosts) != 1 or not is_ours(hosts[0], self._own_host):
            return Problem(403, "host", "Host must be an IP address or localhost.")
        if request.values(b"origin"):
            return Problem(403, "origin", "Requests of web pages are refused.")
        path = TIMELINES if request.path.startswith(TIMELINES) else request.path
        if path not in OPERATORS_PATHS:
            return problem.unknown_path(request.path)
        if request.method not in ("GET", "HEAD"):
            return problem.wrong_method(request.method, path, "GET")
        return None

    def _explain(self, status: int, code: str, text: str) -> Answer:
        reason = Problem(status, code, f"The request cannot be read: {text}.")
        return problem_answer(reason, self._env.new_id())
