"""The router's own metrics, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_fleet.router.audit import Audit
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.meters import Meters

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """All counters; gauges are read from the view and the audit when asked, so that no label outlives its instance."""

    def __init__(self, view: FleetView, audit: Audit, meters: Meters | None = None) -> None:
        self._registry = registry = CollectorRegistry()
        p = "vllm_fleet_router"
        self.requests = Counter(f"{p}_requests", "Answers, by route and status", ["route", "status"], registry=registry)
        self.handoffs = Counter(f"{p}_handoffs", "What became of requests", ["outcome"], registry=registry)
        self.failures = Counter(
            f"{p}_upstream_failures", "Instances that did not answer", ["stage", "kind"], registry=registry
        )
        self.retries = Counter(f"{p}_retries", "Answers asked for again before the first byte", registry=registry)
        self.resumes = Counter(f"{p}_resumes", "Streams cut off: how they went on, or none", ["way"], registry=registry)
        self.turned_away = Counter(f"{p}_turned_away", "Requests that found the queue full", registry=registry)
        self.dropped = Counter(
            f"{p}_steering_fields_dropped", "Requests that tried to set inner fields", registry=registry
        )
        self.first_byte = Histogram(
            f"{p}_time_to_first_byte_seconds",
            "Request received until the first byte of the answer's body",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.prefill = Histogram(
            f"{p}_prefill_seconds", "Time at prefill instances", buckets=_SECONDS, registry=registry
        )
        self.request_bytes = Counter(f"{p}_request_bytes", "Bytes of request bodies", registry=registry)
        self.answer_bytes = Counter(f"{p}_answer_bytes", "Bytes of answer bodies", registry=registry)
        self.waiting: Callable[[], int] = lambda: 0
        """Requests that wait for their turn."""
        self.meters = meters if meters is not None else Meters()
        registry.register(self.meters)
        registry.register(_Gauges(view, audit, lambda: self.waiting()))

    def show(self, more: Collector) -> None:
        """Have further gauges on the page."""
        self._registry.register(more)

    def text(self) -> bytes:
        """The page a Prometheus server reads."""
        return generate_latest(self._registry)


class _Gauges:
    def __init__(self, view: FleetView, audit: Audit, waiting: Callable[[], int]) -> None:
        self._view, self._audit, self._waiting = view, audit, waiting

    def collect(self) -> Iterator[Metric]:
        p = "vllm_fleet_router"
        in_flight = GaugeMetricFamily(f"{p}_in_flight", "Requests running at an instance", labels=["instance"])
        members = GaugeMetricFamily(f"{p}_instances", "Known instances", labels=["role", "state"])
        counts: dict[tuple[str, str], int] = {}
        for member in self._view.members():
            in_flight.add_metric([member.name], self._view.in_flight(member.name))
            counts[member.role, member.state] = counts.get((member.role, member.state), 0) + 1
        for (role, state), number in sorted(counts.items()):
            members.add_metric([role, state], number)
        missing = GaugeMetricFamily(
            f"{p}_handoffs_without_bytes", "Handoffs for which decode loaded no KV", labels=["decode"]
        )
        moved = GaugeMetricFamily(f"{p}_handoff_bytes", "KV bytes decode loaded since first seen", labels=["decode"])
        for name, finding in self._audit.findings().items():
            missing.add_metric([name], finding.without_bytes)
            moved.add_metric([name], finding.seen.bytes)
        breakers = GaugeMetricFamily(f"{p}_breaker_open", "Instances left alone after failures", labels=["instance"])
        for name in sorted(self._view.open_breakers()):
            breakers.add_metric([name], 1)
        waiting = GaugeMetricFamily(f"{p}_waiting", "Requests that wait for their turn")
        waiting.add_metric([], self._waiting())
        yield from (in_flight, members, missing, moved, breakers, waiting)
