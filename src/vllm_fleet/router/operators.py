"""The paths that operators ask: /health, /metrics, and the timeline of a request. Knows no sockets."""

from __future__ import annotations

import hmac
from collections.abc import Coroutine
from urllib.parse import unquote

import msgspec

from vllm_fleet.net.http.messages import Answer, Request
from vllm_fleet.router import headers, problem
from vllm_fleet.router.pages import METRICS_TYPE, Health, Pages
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.siblings import Siblings

HEALTH, METRICS, TIMELINES = "/health", "/metrics", "/fleet/v1/requests/"
OPERATORS_PATHS = (HEALTH, METRICS, TIMELINES)

Named = tuple[tuple[str, str], ...]


class Operators:
    """Answers for this process or, with ``siblings``, for all workers of the router."""

    def __init__(self, pages: Pages, secret: str, siblings: Siblings | None) -> None:
        """``secret`` is what an operator's ``Authorization: Bearer`` must say."""
        self._pages, self._siblings = pages, siblings
        self._authorization = f"Bearer {secret}".encode()

    def handle(self, request: Request, request_id: str) -> Answer | Coroutine[None, None, Answer]:
        """The answer to a GET of one of OPERATORS_PATHS."""
        named = ((headers.REQUEST_ID, request_id),)
        if request.path == HEALTH:
            if self._siblings is not None:
                return self._health_of_all(self._siblings, named)
            return _health(self._pages.health(), named)
        if request.path == METRICS:
            if self._siblings is not None:
                return self._metrics_of_all(self._siblings, named)
            return Answer(200, self._pages.metrics(), METRICS_TYPE, named)
        given = request.text().get("authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, self._authorization):
            return problem_answer(problem.not_authorized(), request_id)
        asked = unquote(request.path.removeprefix(TIMELINES), errors="replace")
        found = self._pages.timeline(asked)
        if found is None and self._siblings is not None:
            return self._timeline_elsewhere(self._siblings, asked, request_id)
        return _timeline(found, asked, request_id)

    async def _health_of_all(self, siblings: Siblings, named: Named) -> Answer:
        return _health(await siblings.health(self._pages.health()), named)

    async def _metrics_of_all(self, siblings: Siblings, named: Named) -> Answer:
        return Answer(200, await siblings.metrics(self._pages.metrics()), METRICS_TYPE, named)

    async def _timeline_elsewhere(self, siblings: Siblings, asked: str, request_id: str) -> Answer:
        return _timeline(await siblings.timeline(asked), asked, request_id)


def problem_answer(reason: Problem, request_id: str) -> Answer:
    """A problem as a whole answer."""
    return Answer(reason.status, reason.body(), headers=((headers.REQUEST_ID, request_id), *reason.headers.items()))


def _health(health: Health, named: Named) -> Answer:
    return Answer(200 if health.can_answer else 503, msgspec.json.encode(health.facts), headers=named)


def _timeline(found: bytes | None, asked: str, request_id: str) -> Answer:
    if found is None:
        return problem_answer(problem.unknown_request(asked), request_id)
    return Answer(200, found, headers=((headers.REQUEST_ID, request_id),))
