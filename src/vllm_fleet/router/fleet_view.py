"""What the router knows of the fleet: who is ready, who fits whom, how busy each is. Pure: time is passed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_fleet.core import limits
from vllm_fleet.wire.control import MAY_DIFFER, Change, Desired, Member, News, Snapshot


@dataclass(slots=True)
class _Backoff:
    until: float
    refusals: int


class FleetView:
    """Members as the controller last told them, and what this router itself saw of them.

    The view outlives the controller: it stays as it is until something newer is known. A controller that restarted
    without its journal knows nobody at first; members only the old one knew stay in use for ORPHAN_S meanwhile.
    """

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._controller = ""
        self._revision = -1
        self._orphan_until: dict[str, float] = {}
        self._backoff: dict[str, _Backoff] = {}
        self._in_flight: Counter[str] = Counter()

    def apply(self, event: News, now: float) -> set[str]:
        """Take over what the controller says. An old or repeated change is ignored.

        Returns:
            Incarnations that ended: whatever still waits for one of them waits in vain.
        """
        before = {member.incarnation for member in self._members.values()}
        if isinstance(event, Snapshot):
            self._replace(event, now)
        elif event.revision > self._revision:
            self._revision = event.revision
            if not isinstance(event, Desired):
                self._change(event)
        return before - {member.incarnation for member in self._members.values()}

    def _change(self, event: Change) -> None:
        name = event.member.name
        self._orphan_until.pop(name, None)
        self._backoff.pop(name, None)
        if event.member.state == "gone":
            self._members.pop(name, None)
        else:
            self._members[name] = event.member

    def _replace(self, snapshot: Snapshot, now: float) -> None:
        members = {member.name: member for member in snapshot.members if member.state != "gone"}
        self._expire_orphans(now)
        orphans: dict[str, float] = {}
        if self._controller not in ("", snapshot.controller):
            for name in self._members.keys() - members.keys():
                orphans[name] = self._orphan_until.get(name, now + limits.ORPHAN_S)
                members[name] = self._members[name]
        for name in self._backoff.keys() - orphans.keys():
            del self._backoff[name]
        self._members, self._orphan_until = members, orphans
        self._controller, self._revision = snapshot.controller, snapshot.revision

    def _expire_orphans(self, now: float) -> None:
        for name in [name for name, until in self._orphan_until.items() if until <= now]:
            del self._orphan_until[name]
            self._members.pop(name, None)
            self._backoff.pop(name, None)

    # Who may take what ---------------------------------------------------------------------------------------------

    def members(self) -> tuple[Member, ...]:
        """Everyone known, whatever the state, by name."""
        return tuple(self._members[name] for name in sorted(self._members))

    def splits(self) -> bool:
        """Whether the fleet has prefill instances at all, ready or not: without them nothing is ever handed off."""
        return any(member.role == "prefill" for member in self._members.values())

    def ready(self, now: float) -> list[Member]:
        """Members that may get requests now, by name."""
        return list(self._ready(now))

    def prefills(self, now: float) -> list[Member]:
        """Ready members that may compute prompts for others."""
        return [member for member in self._ready(now) if member.role != "decode"]

    def decodes(self, now: float) -> list[Member]:
        """Ready members that may write answers."""
        return [member for member in self._ready(now) if member.role != "prefill"]

    def _ready(self, now: float) -> Iterator[Member]:
        self._expire_orphans(now)
        for member in self.members():
            if member.state == "ready" and not self.is_down(member.name, now):
                yield member

    def left_alone(self, now: float) -> list[Member]:
        """Members that are ready, but refused a connection a short while ago; for when nobody else is left."""
        return [m for m in self.members() if m.state == "ready" and self.is_down(m.name, now)]

    # What this router saw ------------------------------------------------------------------------------------------

    def in_flight(self, name: str) -> int:
        """Requests this router has running at ``name``."""
        return self._in_flight[name]

    def begin(self, name: str) -> None:
        """A request is sent to ``name``. Each call is paired with one of ``end``."""
        self._in_flight[name] += 1

    def end(self, name: str) -> None:
        """A request at ``name`` is over."""
        assert self._in_flight[name] > 0, f"request at {name} ended twice"
        self._in_flight[name] -= 1
        if not self._in_flight[name]:
            del self._in_flight[name]

    def is_down(self, name: str, now: float) -> bool:
        """Whether ``name`` refused a connection a short while ago."""
        backoff = self._backoff.get(name)
        return backoff is not None and now < backoff.until

    def mark_down(self, member: Member, now: float) -> None:
        """A connection to ``member`` was refused: leave it alone for a while, longer each time.

        Its next change ends that at once. A later generation of the same name is not blamed.
        """
        known = self._members.get(member.name)
        if known is None or known.incarnation != member.incarnation:
            return
        backoff = self._backoff.setdefault(member.name, _Backoff(now, 0))
        if now < backoff.until:  # one death refuses many requests at once; it counts as one refusal
            return
        backoff.until = now + min(limits.BACKOFF_S * 2**backoff.refusals, limits.BACKOFF_MAX_S)
        backoff.refusals = min(backoff.refusals + 1, 16)

    def mark_up(self, name: str) -> None:
        """``name`` answered."""
        self._backoff.pop(name, None)


def compatible(one: Member, other: Member) -> bool:
    """Whether KV of one can be used by the other; an instance without a fingerprint is taken at its word."""
    if not one.fingerprint or not other.fingerprint:
        return True
    keys = (one.fingerprint.keys() | other.fingerprint.keys()) - MAY_DIFFER
    return all(one.fingerprint.get(key) == other.fingerprint.get(key) for key in keys)


def fleet_health(view: FleetView, now: float) -> tuple[bool, dict[str, object]]:
    """Whether requests can be answered, and what an operator wants to know about it."""
    prefill = sum(member.role == "prefill" for member in view.ready(now))
    decode = sum(member.role == "decode" for member in view.ready(now))
    both = sum(member.role == "both" for member in view.ready(now))
    facts: dict[str, object] = {"status": "ok", "prefill": prefill, "decode": decode, "both": both}
    if not prefill + decode + both:
        states = Counter(member.state for member in view.members())
        return False, {**facts, "status": "unavailable", "missing": "a ready instance", "states": dict(states)}
    if not decode + both:
        missing = "a ready decode instance: prefill instances answer alone"
        return True, {**facts, "status": "degraded", "missing": missing}
    if view.splits() and not prefill:
        missing = "a ready prefill instance: decode instances compute prompts themselves"
        return True, {**facts, "status": "degraded", "missing": missing}
    return True, facts
