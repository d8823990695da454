"""What becomes known of a request that is over, and to whom: metrics, access log, traces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.router.access_log import AccessLog, Line
from vllm_fleet.router.meters import Meters
from vllm_fleet.router.timeline import Timeline
from vllm_fleet.router.tracing import RequestTrace, Tracer

if TYPE_CHECKING:
    from vllm_fleet.router.otlp import Exporter

NOT_SENT = "not_sent"
"""The outcome of a request that no instance was asked for."""
CLIENT_GONE = 499
"""The status of a request whose client hung up; said to operators only."""


class Observer:
    """Belongs to one event loop. Where log and traces are off, the end of a request costs a few counters."""

    def __init__(
        self,
        env: Env,
        meters: Meters | None = None,
        access_log: AccessLog | None = None,
        tracer: Tracer | None = None,
        exporter: Exporter | None = None,
    ) -> None:
        self._env, self._log, self._tracer, self._exporter = env, access_log, tracer, exporter
        self.meters = meters if meters is not None else Meters()
        self.meters.losses = self.losses

    def traced(self, headers: Mapping[str, str]) -> RequestTrace | None:
        """The trace of a request with these headers; None where nobody wants one."""
        return self._tracer.begin(headers) if self._tracer is not None else None

    def ended(
        self, route: str, status: int, request_id: str, tenant: str, began: float, timeline: Timeline | None = None
    ) -> None:
        """A request is over. ``timeline``: of one that was to generate."""
        now = self._env.now()
        if timeline is not None and timeline.outcome is None:
            timeline.end(NOT_SENT, status, now)
        self.meters.ended(route, status, tenant, timeline)
        if timeline is not None and timeline.trace is not None and self._exporter is not None:
            timeline.status = None if status == CLIENT_GONE else status
            self._exporter.ended(timeline.trace, timeline, self._env.wall() - now)
        if self._log is None:
            return
        line = Line(request_id, route, status, now - began, tenant=tenant)
        if timeline is not None:
            line.first_byte_s = timeline.stamps.get("first_byte")
            line.prefill, line.decode = timeline.prefill, timeline.decode
            line.outcome, line.mode = timeline.outcome, timeline.mode
            line.retries, line.resumes = timeline.retries, timeline.resumes
            line.bytes_in, line.bytes_out = timeline.bytes_in, timeline.bytes_out
            line.trace = timeline.trace.trace_id if timeline.trace is not None else None
        self._log.put(line, self._env.wall())

    def losses(self) -> Mapping[str, int]:
        """What nobody will see, by what it was."""
        found = {}
        if self._log is not None:
            found["access_log"] = self._log.dropped
        if self._exporter is not None:
            found["trace"] = self._exporter.dropped
        return found

    def reopen(self) -> None:
        """SIGHUP: the access log was moved away."""
        if self._log is not None:
            self._log.reopen()

    def close(self) -> None:
        """Write and send what waits; takes no longer than ACCESS_STOP_S and SPANS_STOP_S."""
        if self._log is not None:
            self._log.close()
        if self._exporter is not None:
            self._exporter.close()


def observer(fleet: str, env: Env, access_log: str | None, trace_endpoint: str | None, trace_share: float) -> Observer:
    """An observer as the settings want it.

    Raises:
        ConfigError: the log cannot be written, or what tracing needs is not installed.
    """
    log = AccessLog(access_log) if access_log is not None else None
    if trace_endpoint is None:
        return Observer(env, access_log=log)
    try:
        from vllm_fleet.router.otlp import Exporter
    except ImportError as error:
        raise ConfigError(
            f"router.trace.endpoint: {error.name or 'opentelemetry'} is not installed; "
            "run: pip install 'vllm-fleet[trace]'"
        ) from error
    return Observer(env, None, log, Tracer(env, trace_share), Exporter(trace_endpoint, fleet))
