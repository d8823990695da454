"""What the controller knows. Only ``apply`` changes what is saved; replaying a journal is applying it again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from vllm_fleet.core import limits
from vllm_fleet.wire.control import Change, Desired, Load, Member, ReportedState, Slot, Snapshot, State

REPORTED_ORDER: dict[State, int] = {"starting": 0, "ready": 1, "draining": 2}
"""A life goes through these states in this order only: a late heartbeat cannot turn it back."""


class Entry(Struct, frozen=True, tag="entry"):
    """One change as it is saved. ``left``: the member is gone because it said so, so this life never comes back."""

    change: Change | Desired
    left: bool = False


@dataclass(frozen=True)
class Rules:
    """The times that decide about members."""

    heartbeat_s: float = 0.5
    suspect_s: float = 1.5
    lease_s: float = 10.0

    @property
    def tick_s(self) -> float:
        """How often silence is judged: often enough that ``suspect_s`` is exceeded by a quarter at most."""
        return min(1.0, self.suspect_s / 4)

    def beat_s(self, members: int) -> float:
        """How often a member of so many speaks: all together HEARTBEATS_PER_S_MAX times a second, if that leaves each
        five heartbeats within its lease."""
        return max(self.heartbeat_s, min(members / limits.HEARTBEATS_PER_S_MAX, self.lease_s / 5))

    def silence_s(self, members: int) -> float:
        """How long a member of so many may be silent: three heartbeats where they are fewer than ``suspect_s`` is
        meant for."""
        beat_s = self.beat_s(members)
        return self.suspect_s if beat_s == self.heartbeat_s else max(self.suspect_s, 3 * beat_s)


@dataclass
class Pulse:
    """How long one life may stay silent. Not saved: after a restart everybody gets a new one."""

    generation: int
    reported: ReportedState
    suspect_at: float
    gone_at: float
    load: Load | None = None
    """As its last heartbeat said."""


@dataclass
class FleetState:
    """Members by name, the counters, and the changes that watchers may still ask for."""

    controller: str
    rules: Rules
    fleet: str = "default"
    revision: int = 0
    generation: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    desired: Desired = field(default_factory=Desired)
    history: deque[Change | Desired] = field(default_factory=lambda: deque(maxlen=limits.HISTORY_MAX))
    pulses: dict[str, Pulse] = field(default_factory=dict)
    past: dict[tuple[str, str], bool] = field(default_factory=dict)
    """Lives (name, incarnation) that were members. True: it left on purpose; False: it lapsed or was replaced."""
    durable: bool = True
    retry_at: float = 0.0
    ticked: float = 0.0

    def apply(self, entry: Entry, now: float) -> None:
        """Make one change: the only way members, counters and history change."""
        change = entry.change
        assert change.revision > self.revision, (change.revision, self.revision)
        self.revision = change.revision
        self.history.append(change)
        if isinstance(change, Desired):
            self.desired = change
        else:
            self._apply_member(change.member, entry.left, now)

    def _apply_member(self, member: Member, left: bool, now: float) -> None:
        self.generation = max(self.generation, member.generation)
        held = self.members.get(member.name)
        if member.state == "gone":
            self.remember(member.name, member.incarnation, left)
            self.members.pop(member.name, None)
            self.pulses.pop(member.name, None)
            return
        if held is not None and held.incarnation != member.incarnation:
            self.remember(held.name, held.incarnation, left=False)
        self.past.pop((member.name, member.incarnation), None)
        self.members[member.name] = member
        pulse = self.pulses.get(member.name)
        if pulse is None or pulse.generation != member.generation:
            self.pulses[member.name] = self._pulse(member, now)
        elif member.state == "draining":
            pulse.reported = "draining"  # told to by others: its own heartbeats do not say so

    def remember(self, name: str, incarnation: str, left: bool) -> None:
        """Remember a life that was a member, so that it, or a late copy of its registration, pushes nobody out."""
        self.past[(name, incarnation)] = left
        while len(self.past) > limits.PAST_LIVES_MAX:
            del self.past[next(iter(self.past))]

    def heard(self, name: str, reported: ReportedState, now: float) -> ReportedState:
        """Note a sign of life; returns the furthest state that this life has reported."""
        pulse = self.pulses[name]
        if REPORTED_ORDER[reported] > REPORTED_ORDER[pulse.reported]:
            pulse.reported = reported
        pulse.suspect_at = now + self.rules.silence_s(len(self.members))
        pulse.gone_at = now + self.rules.lease_s
        return pulse.reported

    def grant_fresh_silence(self, now: float) -> None:
        """Everybody counts as heard now: after a pause of this process, in which nobody could be heard."""
        suspect_at = now + self.rules.silence_s(len(self.members))
        for pulse in self.pulses.values():
            pulse.gone_at = now + self.rules.lease_s
            pulse.suspect_at = max(suspect_at, min(pulse.suspect_at, pulse.gone_at))

    def grant_restart_grace(self, now: float) -> None:
        """After a restart nobody is suspected or lost for ``lease_s``: members may need as long to find us again."""
        for member in self.members.values():
            pulse = self._pulse(member, now)
            pulse.suspect_at = pulse.gone_at
            self.pulses[member.name] = pulse
        self.ticked = now

    def shift_silence(self, seconds: float, now: float) -> None:
        """Time in which this process did not listen does not count as silence of others."""
        latest = now + self.rules.silence_s(len(self.members))
        for pulse in self.pulses.values():
            pulse.suspect_at = max(pulse.suspect_at, min(pulse.suspect_at + seconds, latest))
            pulse.gone_at = max(pulse.gone_at, min(pulse.gone_at + seconds, now + self.rules.lease_s))

    def hold_leases(self, now: float) -> None:
        """Nobody's lease ends within ``lease_s`` from now."""
        for pulse in self.pulses.values():
            pulse.gone_at = max(pulse.gone_at, now + self.rules.lease_s)

    def restart_history(self, controller: str) -> None:
        """Give this history another name: revisions from here on are not those of the old name."""
        self.controller = controller
        self.history.clear()

    def snapshot(self) -> Snapshot:
        """The whole fleet at this revision."""
        return Snapshot(self.controller, self.revision, tuple(self.members.values()), self.desired)

    def slot(self, name: str) -> Slot | None:
        """What the instance of this name is to be; None when nobody has said."""
        return next((slot for slot in self.desired.instances if slot.name == name), None)

    def changes_since(self, revision: int, controller: str | None = None) -> tuple[Change | Desired, ...] | None:
        """The changes after ``revision``; None when they are not known, or are of another controller's history."""
        if controller is not None and controller != self.controller:
            return None
        oldest = self.history[0].revision - 1 if self.history else self.revision
        if not oldest <= revision <= self.revision:
            return None
        return tuple(change for change in self.history if change.revision > revision)

    def _pulse(self, member: Member, now: float) -> Pulse:
        reported: ReportedState = "starting"
        if member.state == "ready" or member.state == "draining":
            reported = member.state
        suspect_at = now + self.rules.silence_s(len(self.members))
        return Pulse(member.generation, reported, suspect_at, now + self.rules.lease_s)


def with_state(member: Member, state: State) -> Member:
    """``member`` in another state."""
    return replace(member, state=state)
