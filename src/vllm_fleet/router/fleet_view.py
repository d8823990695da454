"""What the router knows of the fleet: who is ready, who fits whom, how busy each is. Pure: time is passed in."""

from __future__ import annotations

from collections import Counter

from vllm_fleet.core import limits
from vllm_fleet.router.breaker import Breaker
from vllm_fleet.wire.control import MAY_DIFFER, Change, Desired, Member, News, Snapshot


class FleetView:
    """Members as the controller last told them, and what this router itself saw of them.

    The view outlives the controller: it stays as it is until something newer is known. A controller that restarted
    without its journal knows nobody at first; members only the old one knew stay in use for ORPHAN_S meanwhile.

    Lists it returns are kept and given again while nothing changes: they are not to be changed.
    """

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._controller = ""
        self._revision = -1
        self._orphan_until: dict[str, float] = {}
        self._breakers: dict[str, Breaker] = {}
        self._open: set[str] = set()
        self._warming: set[str] = set()
        self._credit: dict[str, float] = {}
        self._in_flight: Counter[str] = Counter()
        self._lists: dict[str, list[Member]] = {}
        self._fits: dict[tuple[str, str], bool] = {}

    def apply(self, event: News, now: float) -> set[str]:
        """Take over what the controller says. An old or repeated change is ignored.

        Returns:
            Incarnations that ended: whatever still waits for one of them waits in vain.
        """
        before = {member.incarnation for member in self._members.values()}
        served = {member.incarnation for member in self._members.values() if member.state == "ready"}
        if isinstance(event, Snapshot):
            self._replace(event, now)
        elif event.revision > self._revision:
            self._revision = event.revision
            if not isinstance(event, Desired):
                self._change(event)
        self._lists.clear()
        self._fits.clear()
        if served:
            self._warm_up(served, now)
        return before - {member.incarnation for member in self._members.values()}

    def _warm_up(self, served: set[str], now: float) -> None:
        """Lives that become ready in a fleet that serves already get their share little by little."""
        for name, member in self._members.items():
            if member.state == "ready" and member.incarnation not in served:
                self._breaker(name).warm_up(now)
                self._warming.add(name)

    def _change(self, event: Change) -> None:
        name = event.member.name
        self._orphan_until.pop(name, None)
        self._forgive(name)
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
        for name in self._breakers.keys() - orphans.keys():
            self._forgive(name)
        self._members, self._orphan_until = members, orphans
        self._controller, self._revision = snapshot.controller, snapshot.revision

    def _expire_orphans(self, now: float) -> None:
        for name in [name for name, until in self._orphan_until.items() if until <= now]:
            del self._orphan_until[name]
            self._members.pop(name, None)
            self._forgive(name)
            self._lists.clear()

    # Who may take what ---------------------------------------------------------------------------------------------

    def members(self) -> tuple[Member, ...]:
        """Everyone known, whatever the state, by name."""
        return tuple(self._members[name] for name in sorted(self._members))

    def splits(self) -> bool:
        """Whether the fleet has prefill instances at all, ready or not: without them nothing is ever handed off."""
        return bool(self._list("splits", 0.0))

    def ready(self, now: float) -> list[Member]:
        """Members that may get requests now, by name."""
        return self._list("ready", now)

    def prefills(self, now: float) -> list[Member]:
        """Ready members that may compute prompts for others."""
        return self._list("prefills", now)

    def decodes(self, now: float) -> list[Member]:
        """Ready members that may write answers."""
        return self._list("decodes", now)

    def _list(self, which: str, now: float) -> list[Member]:
        """One of the lists; without the instances whose breaker is open."""
        if self._orphan_until:
            self._expire_orphans(now)
        found = self._lists.get(which)
        if found is None:
            everyone = self.members()
            ready = [member for member in everyone if member.state == "ready"]
            self._lists = {
                "splits": [member for member in everyone if member.role == "prefill"],
                "ready": ready,
                "prefills": [member for member in ready if member.role != "decode"],
                "decodes": [member for member in ready if member.role != "prefill"],
            }
            found = self._lists[which]
        if self._open and which != "splits":
            return [member for member in found if not self.is_down(member.name, now)]
        return found

    def left_alone(self, now: float) -> list[Member]:
        """Members that are ready, but whose breaker is open; for when nobody else is left."""
        return [m for m in self.members() if m.state == "ready" and self.is_down(m.name, now)]

    def offered(self, members: list[Member], now: float, requests_max: int = 0) -> list[Member]:
        """Those of ``members`` to choose from for the next request: with room, and each warming one by its share.

        All of them where nobody would be left.
        """
        if requests_max:
            members = [m for m in members if self._in_flight[m.name] < requests_max] or members
        if not self._warming or len(members) < 2:
            return members
        taking = [member for member in members if member.name not in self._warming or self._turn(member.name, now)]
        return taking or members

    def _turn(self, name: str, now: float) -> bool:
        """Whether a warming instance takes part this time: so often that it gets its share."""
        share = self._breaker(name).share(now)
        if share >= 1.0:
            self._warming.discard(name)
            self._credit.pop(name, None)
            return True
        credit = self._credit.get(name, 0.0) + share
        self._credit[name] = credit - 1.0 if credit >= 1.0 else credit
        return credit >= 1.0

    def fits(self, one: Member, other: Member) -> bool:
        """``compatible``, remembered."""
        key = one.incarnation, other.incarnation
        found = self._fits.get(key)
        if found is None:
            found = self._fits[key] = compatible(one, other)
        return found

    # What this router saw ------------------------------------------------------------------------------------------

    def in_flight(self, name: str) -> int:
        """Requests this router has running at ``name``."""
        return self._in_flight[name]

    def begin(self, name: str, now: float = 0.0) -> None:
        """A request is sent to ``name``. Each call is paired with one of ``end``."""
        self._in_flight[name] += 1
        if name in self._open:
            self._breakers[name].begin(now)

    def end(self, name: str) -> None:
        """A request at ``name`` is over."""
        assert self._in_flight[name] > 0, f"request at {name} ended twice"
        self._in_flight[name] -= 1
        if not self._in_flight[name]:
            del self._in_flight[name]

    def is_down(self, name: str, now: float) -> bool:
        """Whether the breaker of ``name`` lets nothing through now."""
        return name in self._open and not self._breakers[name].allows(now)

    def open_breakers(self) -> frozenset[str]:
        """Instances that failed and have not answered since."""
        return frozenset(self._open)

    def mark_down(self, member: Member, now: float) -> bool:
        """A connection to ``member`` was refused: leave it alone for a while, longer each time.

        Its next change ends that at once. A later generation of the same name is not blamed.

        Returns:
            Whether its breaker opened by this.
        """
        return self.mark_failed(member, now, refused=True)

    def mark_failed(self, member: Member, now: float, *, refused: bool = False) -> bool:
        """``member`` did not answer, or badly. Returns whether its breaker opened by this."""
        known = self._members.get(member.name)
        if known is None or known.incarnation != member.incarnation:
            return False
        opened = self._breaker(member.name).failed(now, refused=refused)
        if opened:
            self._open.add(member.name)
        return opened

    def leave_alone(self, member: Member, until: float) -> None:
        """``member`` asked not to be asked until then."""
        known = self._members.get(member.name)
        if known is not None and known.incarnation == member.incarnation:
            self._breaker(member.name).leave_alone(until)
            self._open.add(member.name)

    def mark_up(self, name: str, now: float) -> None:
        """``name`` answered."""
        breaker = self._breakers.get(name)
        if breaker is None:
            if name in self._members:
                self._breaker(name).succeeded(now)
            return
        if breaker.succeeded(now):
            self._open.discard(name)
            self._warming.add(name)

    def _breaker(self, name: str) -> Breaker:
        found = self._breakers.get(name)
        if found is None:
            found = self._breakers[name] = Breaker()
        return found

    def _forgive(self, name: str) -> None:
        """Hold nothing against whoever is called ``name``."""
        self._breakers.pop(name, None)
        self._open.discard(name)
        self._warming.discard(name)
        self._credit.pop(name, None)


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
