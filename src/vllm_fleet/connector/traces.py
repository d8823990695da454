"""What became of the last handoffs on one worker: the connector's part of a request's timeline."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_fleet.connector.intake import Ended
from vllm_fleet.connector.jobs import GrowJob, HoldJob, LoadJob
from vllm_fleet.core import limits
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.handoff import TraceKind, TracePart, TraceRecord


@dataclass
class _Record:
    request: str
    kind: TraceKind
    began: float
    queued_s: float
    tokens: int = 0
    blocks: int = 0
    ready_s: float = 0.0
    ended_s: float | None = None
    outcome: str = ""
    parts: list[TracePart] = field(default_factory=list)

    def said(self, now: float) -> TraceRecord:
        return TraceRecord(
            self.request,
            self.kind,
            self.outcome or "under_way",
            now - self.began,
            self.queued_s,
            self.ready_s,
            self.ended_s if self.ended_s is not None else now - self.began,
            self.tokens,
            self.blocks,
            tuple(self.parts),
        )


class Traces:
    """The last TRACES_MAX requests of this worker that were handed over or taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[str, _Record] = {}

    def begin(self, grows: Sequence[GrowJob], holds: Sequence[HoldJob], loads: Sequence[LoadJob], now: float) -> None:
        """Jobs that a step brings."""
        if not grows and not holds and not loads:
            return
        with self._lock:
            for grow in grows:
                record = self._record(grow.request, "hold", now, grow.queued_s)
                record.blocks += len(grow.blocks)
            for hold in holds:
                record = self._record(hold.request, "hold", now, 0.0)
                record.tokens, record.blocks = hold.tokens, len(hold.blocks)
                record.ready_s = record.ready_s or now - record.began
                record.outcome = "held"
            for load in loads:
                record = self._record(load.request, "load", now, load.queued_s)
                record.tokens, record.blocks = load.tokens, len(load.blocks)

    def published(self, grows: Sequence[GrowJob], now: float) -> None:
        """A step's KV was told to decode."""
        with self._lock:
            for grow in grows:
                record = self._records.get(grow.request)
                if record is not None:
                    record.tokens, record.ready_s = grow.ready, now - record.began

    def released(self, requests: set[str], now: float) -> None:
        """Held requests whose pins ended."""
        with self._lock:
            for request in requests:
                record = self._records.get(request)
                if record is not None:
                    record.outcome, record.ended_s = "released", now - record.began

    def loaded(self, parts: Sequence[Ended], now: float) -> None:
        """A load ended."""
        with self._lock:
            record = self._records.get(parts[0].request)
            if record is None:
                return
            failed = [part for part in parts if part.error is not None]
            record.outcome = failed[0].reason if failed else "loaded"
            record.ready_s = max(part.wait_s for part in parts)
            record.ended_s = now - record.began
            record.parts = [TracePart(p.peer, p.transport, p.nbytes, p.copies, p.copy_s, p.error or "") for p in parts]

    def answer(self, channel: Channel, question: wire.Question) -> wire.Answer:
        """The records of one request: those whose id begins as asked."""
        assert isinstance(question, wire.Trace)
        with self._lock:
            now = time.monotonic()
            found = [r.said(now) for name, r in self._records.items() if name.startswith(question.prefixes)]
        return wire.Traced(tuple(found[: limits.TRACE_RECORDS_MAX]))

    def _record(self, request: str, kind: TraceKind, now: float, queued_s: float) -> _Record:
        record = self._records.get(request)
        if record is None:
            while len(self._records) >= limits.TRACES_MAX:
                del self._records[next(iter(self._records))]
            record = self._records[request] = _Record(request, kind, now, queued_s)
        return record
