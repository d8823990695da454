"""Spans of one request, as the router saw it: W3C trace context in and out, attempts at instances, the handoff. Pure.

    POST /v1/completions            the client's request, child of what its traceparent names
    ├── prefill                     one for each attempt; vLLM's own spans hang below, where it sends any
    ├── handoff                     KV on its way: from when decode could begin to load until its first byte
    └── decode

Ids are made when a request goes out, for its headers; the spans themselves when it is over (otlp.py), from its stamps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vllm_fleet.core import limits
from vllm_fleet.core.env import Env

if TYPE_CHECKING:
    from vllm_fleet.router.timeline import Timeline

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
Stage = Literal["prefill", "decode"]

_parse = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?").fullmatch


@dataclass(frozen=True, slots=True)
class Parent:
    """What a traceparent says."""

    trace_id: str
    span_id: str
    sampled: bool


def parent_of(traceparent: str | None) -> Parent | None:
    """The caller's span; None when there is none, or the header is not well-formed (W3C Trace Context, 2.2)."""
    found = _parse(traceparent) if traceparent is not None else None
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & 1))


@dataclass(slots=True)
class Attempt:
    """One request to one instance. Times are seconds since the client's request was received."""

    stage: Stage
    instance: str
    span_id: str
    began: float
    ended: float | None = None
    """None: it went on until its answer was complete."""
    failure: str | None = None


@dataclass(slots=True)
class RequestTrace:
    """The ids of one request's spans."""

    trace_id: str
    span_id: str
    parent: Parent | None
    env: Env
    attempts: list[Attempt] = field(default_factory=list)

    def send(self, headers: MutableMapping[str, str], stage: Stage, instance: str, at: float) -> None:
        """A request goes out with these headers, ``at`` seconds after the client's came: it gets a span."""
        if len(self.attempts) >= limits.SPANS_OF_REQUEST_MAX:
            return
        made = Attempt(stage, instance, self.env.new_id()[:16], at)
        self.attempts.append(made)
        headers[TRACEPARENT] = f"00-{self.trace_id}-{made.span_id}-01"

    def failed(self, stage: Stage, instance: str, kind: str, at: float) -> None:
        """The last such request failed."""
        for attempt in reversed(self.attempts):
            if attempt.stage == stage and attempt.instance == instance and attempt.ended is None:
                attempt.ended, attempt.failure = at, kind
                return


class Tracer:
    """Decides which requests are traced."""

    def __init__(self, env: Env, share: float) -> None:
        """``share`` of the requests without a traceparent; the others' callers decide."""
        self._env, self._share = env, share

    def begin(self, headers: Mapping[str, str]) -> RequestTrace | None:
        """A request came; None: it is not traced. ``headers``: names in lower case."""
        parent = parent_of(headers.get(TRACEPARENT))
        if not (parent.sampled if parent is not None else self._env.rng.random() < self._share):
            return None
        trace_id = parent.trace_id if parent is not None else self._env.new_id()
        return RequestTrace(trace_id, self._env.new_id()[:16], parent, self._env)


@dataclass(frozen=True, slots=True)
class Span:
    """One span, ready to be sent. Times are seconds since the request was received."""

    name: str
    kind: Literal["server", "client", "internal"]
    span_id: str
    parent_id: str | None
    began: float
    ended: float
    error: str | None = None
    attributes: Mapping[str, str | int] = field(default_factory=dict)


def spans(trace: RequestTrace, timeline: Timeline) -> Sequence[Span]:
    """All spans of a request that is over."""
    end = timeline.stamps.get("ended", 0.0)
    facts: dict[str, str | int] = {
        "http.request.method": "POST",
        "http.route": timeline.route,
        "vllm_fleet.request_id": timeline.request_id,
        "vllm_fleet.retries": timeline.retries,
        "vllm_fleet.resumes": timeline.resumes,
    }
    known = {
        "http.response.status_code": timeline.status,
        "vllm_fleet.outcome": timeline.outcome,
        "vllm_fleet.mode": timeline.mode,
        "vllm_fleet.tenant": timeline.tenant or None,
    }
    facts |= {name: value for name, value in known.items() if value is not None}
    error = None if timeline.status is not None and timeline.status < 500 else _reason(timeline.status)
    above = trace.parent.span_id if trace.parent is not None else None
    made = [Span(f"POST {timeline.route}", "server", trace.span_id, above, 0.0, end, error, facts)]
    for attempt in trace.attempts:
        ended = attempt.ended
        if ended is None and attempt.stage == "prefill":
            ended = timeline.stamps.get("prefill_answered")
        ended = max(attempt.began, end if ended is None else ended)
        about: dict[str, str | int] = {"vllm_fleet.instance": attempt.instance}
        made.append(
            Span(
                attempt.stage,
                "client",
                attempt.span_id,
                trace.span_id,
                attempt.began,
                ended,
                attempt.failure,
                about,
            )
        )
    if (times := timeline.handoff_span()) is not None:
        who = {"vllm_fleet.prefill": timeline.prefill or "", "vllm_fleet.decode": timeline.decode or ""}
        made.append(Span("handoff", "internal", trace.env.new_id()[:16], trace.span_id, *times, None, who))
    return made


def _reason(status: int | None) -> str:
    return "the client hung up" if status is None else f"status {status}"
