"""Spans to an OpenTelemetry collector, with opentelemetry-sdk's own exporter. Imported only where tracing is on."""

from __future__ import annotations

import logging

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from vllm_fleet import __version__
from vllm_fleet.core import limits, log
from vllm_fleet.router.drain import Drain
from vllm_fleet.router.timeline import Timeline
from vllm_fleet.router.tracing import RequestTrace, Span, spans

_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("vllm_fleet.router", __version__)
_LIBRARY = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_SEND_EVERY_S = 0.5

_Ended = tuple[RequestTrace, Timeline, float]


class Exporter:
    """Takes requests that are over and sends their spans, in a thread of its own. A collector that is away or slow
    costs spans, which are counted, and nothing else.
    """

    def __init__(self, endpoint: str, fleet: str) -> None:
        """``endpoint``: the full URL, with its path (``/v1/traces``). What else the library wants to know, such as
        headers, it takes from OTEL_EXPORTER_OTLP_* variables.
        """
        self.failed = 0
        """Requests whose spans were lost on the way."""
        self._why = _LastWord()
        library = logging.getLogger(_LIBRARY)
        library.handlers[:] = [self._why]
        library.propagate = False
        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=limits.SPANS_SEND_S)
        self._resource = Resource.create({"service.name": "vllm-fleet-router", "vllm_fleet.fleet": fleet})
        self._drain: Drain[_Ended] = Drain("fleet-spans", self._send, limits.SPANS_MAX, _SEND_EVERY_S)

    @property
    def dropped(self) -> int:
        """Requests that were traced and whose spans nobody will see."""
        return self._drain.dropped + self.failed

    def ended(self, trace: RequestTrace, timeline: Timeline, wall_zero: float) -> None:
        """A request is over; ``wall_zero``: wall clock minus the router's monotonic one."""
        self._drain.put((trace, timeline, timeline.received + wall_zero))

    def close(self) -> None:
        """Send what waits, within SPANS_STOP_S."""
        self._drain.close(limits.SPANS_STOP_S)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _send(self, batch: list[_Ended]) -> None:
        for at in range(0, len(batch), limits.SPANS_BATCH_MAX):
            part = batch[at : at + limits.SPANS_BATCH_MAX]
            made = [self._made(span, trace, zero) for trace, timeline, zero in part for span in spans(trace, timeline)]
            try:
                result = self._exporter.export(made)
            except Exception as error:  # noqa: BLE001  a library's thread must not end ours: serving goes on
                self._why.text, result = f"{type(error).__name__}: {error}", SpanExportResult.FAILURE
            if result is not SpanExportResult.SUCCESS:
                self.failed += len(part)
                log.warn("trace.failed", requests=len(part), reason=self._why.text[:300])

    def _made(self, span: Span, trace: RequestTrace, zero: float) -> ReadableSpan:
        trace_id = int(trace.trace_id, 16)
        parent = None
        if span.parent_id is not None:
            remote = span.kind == "server"
            parent = SpanContext(trace_id, int(span.parent_id, 16), remote, _SAMPLED)
        return ReadableSpan(
            name=span.name,
            context=SpanContext(trace_id, int(span.span_id, 16), False, _SAMPLED),
            parent=parent,
            resource=self._resource,
            attributes=dict(span.attributes),
            kind=_KINDS[span.kind],
            status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=int((zero + span.began) * 1e9),
            end_time=int((zero + span.ended) * 1e9),
            instrumentation_scope=_SCOPE,
        )


class _LastWord(logging.Handler):
    """Keeps the library's last complaint, for ours."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()
