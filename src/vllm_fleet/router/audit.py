"""Does KV really move? Compares the handoffs the router sent with what decode instances say they loaded.

Prefill/decode in name only is easy to get and hard to see: every answer is right, and each prompt is computed twice.
So each decode instance's own counters are read while handoffs go there, and what is missing is shown and logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.upstream import Upstream, UpstreamFailure
from vllm_fleet.wire.control import UPSTREAM_CONNECTOR, Member

HANDOFFS = "vllm:fleet_handoffs_total"
BYTES = "vllm:fleet_handoff_bytes_total"


@dataclass(frozen=True, slots=True)
class Counts:
    """What one decode instance says, summed over its engines."""

    loaded: int = 0
    local: int = 0
    recomputed: int = 0
    refused: int = 0
    bytes: int = 0
    found: bool = False
    """Whether the connector's counters were there at all."""

    def minus(self, other: Counts) -> Counts:
        """What was added since ``other``."""
        return Counts(
            self.loaded - other.loaded,
            self.local - other.local,
            self.recomputed - other.recomputed,
            self.refused - other.refused,
            self.bytes - other.bytes,
            self.found,
        )

    def went_back(self, other: Counts) -> bool:
        """Whether a counter is below what it was: the process was started anew."""
        return self.loaded < other.loaded or self.local < other.local or self.bytes < other.bytes


def parse_counts(page: str) -> Counts:
    """The connector's counters in a /metrics page; ValueError when they are not readable."""
    # Only their lines go through the parser: vLLM's page has thousands, and this runs between requests.
    wanted = "".join(line + "\n" for line in page.splitlines() if line.startswith((HANDOFFS, BYTES)))
    outcomes: dict[str, int] = {}
    total = 0
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            if sample.name == HANDOFFS:
                outcome = sample.labels.get("outcome", "")
                outcomes[outcome] = outcomes.get(outcome, 0) + int(sample.value)
            elif sample.name == BYTES:
                total += int(sample.value)
    return Counts(
        outcomes.get("loaded", 0),
        outcomes.get("local", 0) + outcomes.get("computed", 0),
        outcomes.get("recomputed", 0),
        outcomes.get("refused", 0),
        total,
        bool(wanted),
    )


@dataclass(slots=True)
class Ledger:
    """One decode instance's handoffs: what was sent there against what it says became of them."""

    baseline: Counts | None = None
    """Its counters when first seen: other routers, and this one's earlier life, are not this ledger's business."""
    sent: int = 0
    last_sent: float = float("-inf")
    polls: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, sent so far) of the last polls; as many as fit into the settle time."""
    missing_before: int = 0
    """Found missing in earlier lives of the instance's process."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one comparison says."""

    sent: int
    """Handoffs old enough to be judged."""
    seen: Counts
    without_bytes: int


def reconcile(ledger: Ledger, counts: Counts, now: float) -> Finding:
    """Compare. Handoffs younger than the settle time are not judged yet; a restarted process starts a new page."""
    if ledger.baseline is None:
        ledger.baseline = counts
    since = counts.minus(ledger.baseline)
    ledger.polls.append((now, ledger.sent))
    while len(ledger.polls) > 1 and ledger.polls[1][0] <= now - limits.AUDIT_SETTLE_S:
        ledger.polls.popleft()
    judged = ledger.polls[0][1]  # 0 on a new page: its first poll comes before its first handoff
    missing = max(0, judged - since.loaded - since.local)
    return Finding(judged, since, ledger.missing_before + missing)


def start_over(ledger: Ledger, last: Finding | None, counts: Counts) -> None:
    """The instance's process was started anew: keep what was found, judge nothing that died with it."""
    ledger.missing_before = last.without_bytes if last is not None else 0
    ledger.baseline, ledger.sent = counts, 0
    ledger.polls.clear()


class Audit:
    """Ledgers of all decode instances, and the loop that reads their counters. Belongs to one event loop."""

    def __init__(self) -> None:
        self._ledgers: dict[str, Ledger] = {}
        self._findings: dict[str, Finding] = {}
        self._last: dict[str, Counts] = {}
        self._incarnations: dict[str, str] = {}

    def known(self, name: str) -> bool:
        """Whether the instance's counters were read once, so that handoffs can be counted from there."""
        ledger = self._ledgers.get(name)
        return ledger is not None and ledger.baseline is not None

    def sent(self, name: str, now: float) -> None:
        """A handoff to ``name`` was answered: the first byte came, so the KV must have been loaded by then.

        One that started before the instance's counters were first read is not reported here.
        """
        ledger = self._ledgers.get(name)
        if ledger is not None:  # else it left the fleet meanwhile
            ledger.sent += 1
            ledger.last_sent = now

    def findings(self) -> dict[str, Finding]:
        """The last comparison for each decode instance that was sent handoffs."""
        return {name: found for name, found in self._findings.items() if self._ledgers[name].last_sent > float("-inf")}

    def due(self, members: Iterable[Member], now: float) -> list[Member]:
        """Whose counters to read now: those never read, and those with handoffs that are not judged yet."""
        settle = limits.AUDIT_SETTLE_S + 2 * limits.AUDIT_POLL_S
        wanted = []
        for member in members:
            if UPSTREAM_CONNECTOR in member.fingerprint:
                continue
            ledger = self._ledgers.get(member.name)
            fresh = self._incarnations.get(member.name) != member.incarnation
            if fresh or ledger is None or now - ledger.last_sent < settle:
                wanted.append(member)
        return wanted

    def forget(self, names: set[str]) -> None:
        """Drop all but ``names``: the others left the fleet."""
        for table in (self._ledgers, self._findings, self._last, self._incarnations):
            for name in table.keys() - names:
                del table[name]

    def take(self, member: Member, counts: Counts, now: float) -> Finding | None:
        """Take over freshly read counters; a Finding when more handoffs are missing than before."""
        name = member.name
        ledger = self._ledgers.setdefault(name, Ledger())
        before = self._findings.get(name)
        last = self._last.get(name)
        restarted = last is not None and (self._incarnations.get(name) != member.incarnation or counts.went_back(last))
        if restarted:
            start_over(ledger, before, counts)
        found = reconcile(ledger, counts, now)
        self._findings[name], self._last[name] = found, counts
        self._incarnations[name] = member.incarnation
        grew = found.without_bytes > (before.without_bytes if before is not None else 0)
        return found if grew else None


async def run_audit(audit: Audit, view: FleetView, upstream: Upstream, env: Env) -> None:
    """Read the counters that are due, each AUDIT_POLL_S, until cancelled."""
    while True:
        now = env.now()
        audit.forget({member.name for member in view.members()})
        for batch in _batches(audit.due(view.decodes(now), now), 16):
            async with asyncio.TaskGroup() as group:
                for member in batch:
                    group.create_task(_read(audit, member, upstream, env))
        await asyncio.sleep(limits.AUDIT_POLL_S)


async def _read(audit: Audit, member: Member, upstream: Upstream, env: Env) -> None:
    try:
        async with asyncio.timeout(limits.AUDIT_READ_S), upstream.get(f"{member.url}/metrics", {}) as answer:
            page = await answer.read(limits.METRICS_BODY_BYTES_MAX)
            if answer.status != 200:
                return
        counts = parse_counts(page.decode(errors="replace"))
    except (UpstreamFailure, TimeoutError, ValueError):
        return  # a request will meet the same failure and report it; here the next turn tries again
    found = audit.take(member, counts, env.now())
    if found is not None:
        log.event(
            "handoff.no_bytes",
            level=logging.WARNING,
            decode=member.name,
            without_bytes=found.without_bytes,
            sent=found.sent,
            loaded=found.seen.loaded,
            local=found.seen.local,
            recomputed=found.seen.recomputed,
            refused=found.seen.refused,
            bytes=found.seen.bytes,
            connector_metrics=found.seen.found,
        )


def _batches(members: list[Member], size: int) -> Iterable[list[Member]]:
    return (members[start : start + size] for start in range(0, len(members), size))
