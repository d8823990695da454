"""Metrics of the hot path and of tenants: plain numbers here, a page for Prometheus when somebody asks (histogram.py).

Every family is in docs/metrics.md; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from vllm_fleet.core import limits
from vllm_fleet.router.histogram import Histogram

if TYPE_CHECKING:
    from vllm_fleet.router.timeline import Timeline

OTHERS = "(others)"
_P = "vllm_fleet_router"
_WHOLE = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_HANDOFF = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0, 60.0)


def _nothing() -> Mapping[str, int]:
    return {}


class Meters:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._whole: dict[str, Histogram] = {}
        self._handoff: dict[str, Histogram] = {}
        self._tenants: dict[str, list[int]] = {}
        self._choices: dict[tuple[str, str], int] = {}
        self.policies: Mapping[str, str] = {}
        """Stage -> the policy that chooses instances for it."""
        self.between = Histogram(_BETWEEN)
        """Seconds between two parts of a stream."""
        self.losses: Callable[[], Mapping[str, int]] = _nothing

    def sent(self, stage: str, instance: str) -> None:
        """A request was sent to an instance."""
        key = (stage, instance)
        count = self._choices.get(key)
        if count is None and len(self._choices) >= 2 * limits.MEMBERS_MAX:
            self._choices.clear()  # names of instances that came and went for ever
        self._choices[key] = 1 if count is None else count + 1

    def ended(self, route: str, status: int, tenant: str, timeline: Timeline | None) -> None:
        """A request is over."""
        if tenant:
            self._count(tenant, status, timeline)
        if timeline is None or status >= 400:
            return
        seconds = timeline.stamps.get("ended")
        if seconds is not None:
            whole = self._whole.get(route)
            if whole is None:
                whole = self._whole[route] = Histogram(_WHOLE)
            whole.observe(seconds)
        span = timeline.handoff_span()
        if span is not None and timeline.mode is not None:
            handoff = self._handoff.get(timeline.mode)
            if handoff is None:
                handoff = self._handoff[timeline.mode] = Histogram(_HANDOFF)
            handoff.observe(span[1] - span[0])

    def _count(self, tenant: str, status: int, timeline: Timeline | None) -> None:
        row = self._tenants.get(tenant)
        if row is None:
            if len(self._tenants) >= limits.TENANT_LABELS_MAX:
                tenant = OTHERS
            row = self._tenants.setdefault(tenant, [0, 0, 0, 0])
        row[0] += 1
        row[1] += status >= 400
        if timeline is not None:
            row[2] += timeline.bytes_in
            row[3] += timeline.bytes_out

    def collect(self) -> Iterator[Metric]:
        """What Prometheus's registry asks for."""
        whole = HistogramMetricFamily(
            f"{_P}_request_seconds",
            "Requests that succeeded, from their head to the end of the answer",
            labels=["route"],
        )
        for route, histogram in sorted(self._whole.items()):
            histogram.add_to(whole, [route])
        handoff = HistogramMetricFamily(
            f"{_P}_handoff_seconds", "From when decode could begin to load until its first byte", labels=["mode"]
        )
        for mode, histogram in sorted(self._handoff.items()):
            histogram.add_to(handoff, [mode])
        between = HistogramMetricFamily(f"{_P}_inter_token_seconds", "Between two parts of a stream", labels=[])
        self.between.add_to(between, [])
        choices = CounterMetricFamily(
            f"{_P}_choices", "Requests sent to an instance that a policy chose", labels=["stage", "policy", "instance"]
        )
        for (stage, instance), number in sorted(self._choices.items()):
            choices.add_metric([stage, self.policies.get(stage, ""), instance], number)
        lost = CounterMetricFamily(f"{_P}_observations_lost", "Log lines and traced requests lost", labels=["what"])
        for what, number in sorted(self.losses().items()):
            lost.add_metric([what], number)
        yield from (whole, handoff, between, choices, lost, *self._of_tenants())

    def _of_tenants(self) -> Iterator[Metric]:
        about = (
            ("requests", "Requests of an API key"),
            ("errors", "... that were answered with 400 or more, or whose client hung up"),
            ("request_bytes", "Bytes of request bodies of an API key"),
            ("answer_bytes", "Bytes of answer bodies of an API key"),
        )
        for column, (name, text) in enumerate(about):
            family = CounterMetricFamily(f"{_P}_tenant_{name}", text, labels=["tenant"])
            for tenant, row in sorted(self._tenants.items()):
                family.add_metric([tenant], row[column])
            yield family
