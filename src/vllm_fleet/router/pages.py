"""What operators ask one router process for: its health, its metrics, the timeline of a request. Knows no sockets."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from vllm_fleet.core.env import Env
from vllm_fleet.router.exchange import Exchange
from vllm_fleet.router.fleet_view import FleetView, fleet_health
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.timeline import Timelines

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Facts = dict[str, object]


@dataclass(frozen=True, slots=True)
class Health:
    """``can_answer``: requests can be answered here."""

    can_answer: bool
    facts: Facts


class Pages:
    """The pages of one process."""

    def __init__(self, view: FleetView, exchange: Exchange, metrics: Metrics, timelines: Timelines, env: Env) -> None:
        self._view, self._exchange, self._metrics = view, exchange, metrics
        self._timelines, self._env = timelines, env

    def health(self) -> Health:
        """Whether requests can be answered, and what an operator wants to know about it."""
        can_answer, facts = fleet_health(self._view, self._env.now())
        if self._exchange.stopping:
            return Health(False, {**facts, "status": "stopping"})
        return Health(can_answer, facts)

    def metrics(self) -> bytes:
        """The page a Prometheus server reads."""
        return self._metrics.text()

    def timeline(self, request_id: str) -> bytes | None:
        """What happened to a request, as JSON; None: it never came here, or it is too long ago."""
        found = self._timelines.get(request_id)
        return None if found is None else msgspec.json.encode(found.facts())
