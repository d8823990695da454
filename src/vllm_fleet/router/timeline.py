"""When what happened to one request, for whoever asks why it took so long. Pure: time is passed in."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from vllm_fleet.core import limits
from vllm_fleet.router.handoff import HANDED_OFF, Handoff
from vllm_fleet.router.tracing import RequestTrace

Stamp = Literal["prefill_sent", "prefill_answered", "decode_sent", "first_byte", "ended"]
"""``decode_sent`` and ``first_byte`` are of the attempt whose answer the client got; ``prefill_answered`` in full."""


@dataclass(slots=True)
class Timeline:
    """One request; stamps are seconds since it was received. Holds no part of its body and no ticket."""

    request_id: str
    route: str
    received: float
    """On the router's monotonic clock."""
    stamps: dict[Stamp, float] = field(default_factory=dict)
    prefill: str | None = None
    decode: str | None = None
    mode: str | None = None
    """``streamed`` or ``sequential``; None: no prefill instance was asked."""
    outcome: str | None = None
    """None while it runs."""
    status: int | None = None
    """What the client was told; None: nothing yet, or it hung up before."""
    tenant: str = ""
    """Whose API key it was; empty: nobody's."""
    inner_id: str = ""
    """Its X-Request-Id at instances; empty: the client's own."""
    retries: int = 0
    """Times it was asked for again elsewhere before its first byte."""
    resumes: int = 0
    """Times it went on elsewhere after that."""
    bytes_in: int = 0
    bytes_out: int = 0
    """Of the bodies."""
    trace: RequestTrace | None = None
    """None: nobody traces it."""

    def mark(self, stamp: Stamp, now: float) -> None:
        """``stamp`` happened now; a later attempt at the same thing replaces the earlier one."""
        self.stamps[stamp] = now - self.received

    def took_part(self, handoff: Handoff) -> None:
        """Take over who was asked, and how."""
        self.prefill = handoff.prefill.name if handoff.prefill is not None else None
        self.decode = handoff.decode.name if handoff.decode is not None else None
        self.mode = handoff.mode if handoff.prefill is not None else None

    def end(self, outcome: str, status: int | None, now: float) -> None:
        """The request is over; a prefill instance that has not answered yet may still add its stamp."""
        self.outcome, self.status = outcome, status
        self.mark("ended", now)

    def handoff_span(self) -> tuple[float, float] | None:
        """When KV moved to decode: from when it could begin to load (streamed: from the start) until the first byte of
        its answer; None: nothing was handed off, or it is not over.
        """
        begin = self.stamps.get("decode_sent" if self.mode == "streamed" else "prefill_answered")
        end = self.stamps.get("first_byte")
        if self.outcome != HANDED_OFF or begin is None or end is None:
            return None
        return begin, max(begin, end)

    def server_timing(self) -> str:
        """The value of a Server-Timing header, in ms; empty when nothing is known yet."""
        spans: tuple[tuple[str, Stamp, Stamp], ...] = (
            ("prefill", "prefill_sent", "prefill_answered"),
            ("wait", "decode_sent", "first_byte"),
        )
        known = [
            f"{name};dur={1000 * (self.stamps[end] - self.stamps[begin]):.1f}"
            for name, begin, end in spans
            if begin in self.stamps and end in self.stamps
        ]
        return ", ".join(known)

    def facts(self) -> dict[str, object]:
        """The same as JSON."""
        stamps = sorted(self.stamps.items(), key=lambda item: item[1])
        return {
            "id": self.request_id,
            "route": self.route,
            "prefill": self.prefill,
            "decode": self.decode,
            "mode": self.mode,
            "outcome": self.outcome,
            "status": self.status,
            "tenant": self.tenant,
            "inner_id": self.inner_id or self.request_id,
            "retries": self.retries,
            "resumes": self.resumes,
            "seconds": {"received": 0.0} | {name: round(at, 6) for name, at in stamps},
        }


class Timelines:
    """The last TIMELINES_MAX requests, by id; of two with one id, the later."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Timeline] = OrderedDict()

    def begin(self, request_id: str, route: str, now: float) -> Timeline:
        """A request was received at ``now``."""
        made = Timeline(request_id, route, now)
        self._kept[request_id] = made
        self._kept.move_to_end(request_id)
        while len(self._kept) > limits.TIMELINES_MAX:
            self._kept.popitem(last=False)
        return made

    def get(self, request_id: str) -> Timeline | None:
        """What is known of a request; None: it never came, or it is too long ago."""
        return self._kept.get(request_id)
