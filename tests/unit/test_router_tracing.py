"""Spans: what a request's traceparent says, what instances are told, and what a collector gets over OTLP/HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan

from tests.unit.mock_instance import TOKEN, fleet, pair, streaming_pair, until
from vllm_fleet.config.front_settings import FrontSettings
from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net.sockets import free_port, listen
from vllm_fleet.router.front import make_front
from vllm_fleet.router.observer import observer
from vllm_fleet.router.tracing import Parent, Tracer, parent_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

# Trace context -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parent"),
    [
        (f"00-{TRACE}-{SPAN}-01", Parent(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", Parent(TRACE, SPAN, False)),
        (f"00-{TRACE}-{SPAN}-03", Parent(TRACE, SPAN, True)),
        (f"cc-{TRACE}-{SPAN}-01-more", Parent(TRACE, SPAN, True)),  # later versions may say more
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
        (None, None),
    ],
)
def test_what_a_traceparent_says(given: str | None, parent: Parent | None) -> None:
    assert parent_of(given) == parent


def test_who_decides_what_is_traced() -> None:
    never, always = Tracer(RealEnv(), 0.0), Tracer(RealEnv(), 1.0)
    assert never.begin({}) is None
    assert always.begin({"traceparent": f"00-{TRACE}-{SPAN}-00"}) is None
    joined = never.begin({"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert joined is not None
    assert (joined.trace_id, joined.parent) == (TRACE, Parent(TRACE, SPAN, True))
    own = always.begin({"traceparent": "junk"})
    assert own is not None
    assert own.parent is None
    assert re.fullmatch("[0-9a-f]{32}", own.trace_id)
    assert re.fullmatch("[0-9a-f]{16}", own.span_id)


# To a collector ----------------------------------------------------------------------------------------------------


@dataclass
class Collector:
    """Takes what an OTLP/HTTP exporter sends, and reads it."""

    url: str = ""
    status: int = 200
    spans: list[OtlpSpan] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        told = ExportTraceServiceRequest.FromString(await request.read())
        if self.status == 200:
            for resource in told.resource_spans:
                self.resources.append(strings(resource.resource.attributes))
                for scope in resource.scope_spans:
                    self.spans += scope.spans
        return web.Response(status=self.status)

    def named(self, name: str) -> list[OtlpSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> OtlpSpan:
        (found,) = self.named(name)
        return found


def strings(attributes: Any) -> dict[str, str]:
    return {each.key: each.value.string_value or str(each.value.int_value) for each in attributes}


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    with listen("127.0.0.1", 0, setting="test") as listener:
        collector.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"
        await web.SockSite(runner, listener).start()
        try:
            yield collector
        finally:
            await runner.cleanup()


def tracing(url: str, share: float = 1.0) -> FrontSettings:
    return FrontSettings(trace_endpoint=url, trace_share=share)


async def test_a_streamed_handoff_as_spans() -> None:
    p, d = streaming_pair()
    async with collecting() as collector:
        front = make_front(tracing(collector.url), "f", TOKEN, RealEnv())
        async with fleet(p, d, front=front) as up:
            parent = f"00-{TRACE}-{SPAN}-01"
            await up.post({"prompt": "confidential"}, traceparent=parent, tracestate="a=b", **{"x-request-id": "r"})
        await asyncio.to_thread(front.close)

        assert {span.name for span in collector.spans} == {"POST /v1/completions", "prefill", "handoff", "decode"}
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
        request = collector.one("POST /v1/completions")
        assert request.parent_span_id.hex() == SPAN
        assert request.kind == OtlpSpan.SPAN_KIND_SERVER
        for name, seen in (("prefill", p.seen[0]), ("decode", d.seen[0])):
            span = collector.one(name)
            assert seen.headers["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
            assert seen.headers["tracestate"] == "a=b"
            assert span.kind == OtlpSpan.SPAN_KIND_CLIENT
        handoff = collector.one("handoff")
        for inner in (collector.one("prefill"), handoff, collector.one("decode")):
            assert inner.parent_span_id == request.span_id
            assert request.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano
        assert len({span.span_id for span in collector.spans}) == 4
        facts = strings(request.attributes)
        assert facts["vllm_fleet.request_id"] == "r"
        assert (facts["vllm_fleet.outcome"], facts["vllm_fleet.mode"]) == ("handed_off", "streamed")
        assert facts["http.response.status_code"] == "200"
        assert strings(handoff.attributes) == {"vllm_fleet.prefill": "p", "vllm_fleet.decode": "d"}
        assert {r["service.name"] for r in collector.resources} == {"vllm-fleet-router"}
        assert "confidential" not in str(collector.spans)


async def test_each_attempt_has_a_span_and_failures_say_so() -> None:
    first, second = pair()[1], pair()[1]
    first.name, second.name, first.fault = "d1", "d2", "drop"
    first.role = second.role = "both"
    async with collecting() as collector:
        front = make_front(tracing(collector.url), "f", TOKEN, RealEnv())
        async with fleet(first, second, front=front) as up:
            for _ in range(4):  # whoever is asked first
                assert (await up.post({"prompt": "hi"}))[0] == 200
            status, _, _ = await up.post(b"{")
            assert status == 400
        await asyncio.to_thread(front.close)
        requests = collector.named("POST /v1/completions")
        assert len({span.trace_id for span in requests}) == 5  # no traceparent: a trace each
        attempts = collector.named("decode")
        bad = [span for span in attempts if span.status.code == span.status.STATUS_CODE_ERROR]
        assert len(attempts) == 4 + len(bad) > 4
        assert {strings(span.attributes)["vllm_fleet.instance"] for span in bad} == {"d1"}
        assert {span.status.message for span in bad} == {"disconnected"}
        refused = [span for span in requests if strings(span.attributes)["vllm_fleet.outcome"] == "not_sent"]
        assert [strings(span.attributes)["http.response.status_code"] for span in refused] == ["400"]
        retried = [strings(span.attributes)["vllm_fleet.retries"] for span in requests]
        assert sum(map(int, retried)) == len(bad)


async def test_what_is_not_sampled_keeps_its_traceparent() -> None:
    p, d = pair()
    async with collecting() as collector:
        front = make_front(tracing(collector.url, 0.0), "f", TOKEN, RealEnv())
        async with fleet(p, d, front=front) as up:
            await up.post({"prompt": "hi"})
            await up.post({"prompt": "hi"}, traceparent=f"00-{TRACE}-{SPAN}-00")
        await asyncio.to_thread(front.close)
        assert collector.spans == []
        assert "traceparent" not in d.seen[0].headers
        assert d.seen[1].headers["traceparent"] == f"00-{TRACE}-{SPAN}-00"


async def test_a_collector_that_refuses_or_is_away_costs_spans_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SPANS_STOP_S", 0.1)
    async with collecting() as collector:
        collector.status = 400  # 5xx would be tried again for a while
        for url in (collector.url, f"http://127.0.0.1:{free_port('127.0.0.1')}/v1/traces"):
            front = make_front(tracing(url), "f", TOKEN, RealEnv())
            async with fleet(*pair(), front=front) as up:
                assert (await up.post({"prompt": "hi"}))[0] == 200
                if url == collector.url:
                    lost = 'vllm_fleet_router_observations_lost_total{what="trace"}'
                    await until(lambda: up.metric(lost) == 1)  # noqa: B023
            await asyncio.to_thread(front.close)
        assert collector.spans == []


# Off ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_imported_where_tracing_is_off() -> None:
    script = "import sys, vllm_fleet.router.__main__; assert not [m for m in sys.modules if m.startswith('opentele')]"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 0, run.stderr


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm_fleet.router.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"^router.trace.endpoint: .* run: pip install 'vllm-fleet\[trace\]'$"):
        observer("f", RealEnv(), None, "http://127.0.0.1:1/v1/traces", 1.0)
