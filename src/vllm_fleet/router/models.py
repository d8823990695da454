"""The list of models, asked of any instance and kept for a few seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_fleet.core import limits
from vllm_fleet.core.env import Env
from vllm_fleet.router import headers, problem
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.upstream import Upstream, UpstreamFailure

_ASK_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An instance's answer."""

    status: int
    content_type: str
    body: bytes


class Models:
    """Asks instances in turn until one answers."""

    def __init__(self, view: FleetView, upstream: Upstream, env: Env) -> None:
        self._view, self._upstream, self._env = view, upstream, env
        self._kept: tuple[str | None, float, Answer] | None = None

    async def get(self, asked: Mapping[str, str], request_id: str) -> Answer | Problem:
        """The list, no older than MODELS_CACHE_S, or why there is none."""
        now = self._env.now()
        # Instances may want an API key: what one key was shown is not shown to another.
        key = asked.get("authorization")
        if self._kept is not None and self._kept[0] == key and now < self._kept[1]:
            return self._kept[2]
        members = [*self._view.decodes(now), *(one for one in self._view.prefills(now) if one.role == "prefill")]
        wanted = headers.to_instance(asked, request_id)
        for member in members[: limits.DECODE_ATTEMPTS_MAX]:
            try:
                async with (
                    asyncio.timeout(_ASK_S),
                    self._upstream.get(f"{member.url}/v1/models", wanted) as answer,
                ):
                    body = await answer.read(limits.ERROR_BODY_BYTES_MAX)
            except (UpstreamFailure, TimeoutError) as failure:
                if isinstance(failure, UpstreamFailure) and failure.kind == "refused":
                    self._view.mark_down(member, self._env.now())
                continue
            if answer.status == 200:
                found = Answer(200, headers.content_type(answer.headers) or problem.JSON, body)
                self._kept = (key, self._env.now() + limits.MODELS_CACHE_S, found)
                return found
            if answer.status < 500:
                return Answer(answer.status, problem.JSON, problem.foreign(member.name, answer.status, body))
        return problem.upstream_died(members[0].name) if members else problem.no_instance()
