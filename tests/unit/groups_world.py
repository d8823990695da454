"""Members that follow the protocol of docs/groups.md, a network and a clock, around the controller's own decisions.

Every message is encoded and decoded. After each step the promises are checked that must hold always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import msgspec

from vllm_fleet.controller.group import Group
from vllm_fleet.controller.group_state import Refusal, Standing
from vllm_fleet.controller.groups import Groups
from vllm_fleet.core import limits
from vllm_fleet.wire import groups as wire

GROUP = "g"
WAIT_S = 1.0
FORM_S = 4.0
GATHER_S = 1.0
QUIET_S = 2 * (limits.GROUP_LEASE_S + FORM_S + 5 * GATHER_S)
"""After the last fault everybody who lives is in a formed epoch within this time."""

Stage = Literal["meeting", "making", "joining", "in", "gone"]
Loss = Literal["", "request", "reply", "twice"]


TICK_S = 0.25
"""Coarser than the real one, for speed."""

Message = TypeVar("Message", bound=msgspec.Struct)


def recoded(message: Message) -> Message:
    """Through bytes and back."""
    return msgspec.json.decode(wire.encode(message), type=type(message))


@dataclasses.dataclass
class Member:
    """One life of one worker."""

    who: wire.Attendee
    terms: wire.Terms
    stage: Stage = "meeting"
    after: int = 0
    epoch: wire.EpochId | None = None
    ranks: tuple[str, ...] = ()
    group_id: bytes = b""
    formed: bool = False

    @property
    def name(self) -> str:
        return self.who.name

    def done_with(self) -> None:
        """The epoch is over."""
        if self.epoch is not None:
            self.after = max(self.after, self.epoch.number)
        self.stage, self.epoch, self.formed = "meeting", None, False


class World:
    """All of it. ``loss`` says what happens to the next message."""

    def __init__(self, names: str, least: int = 2, gather_s: float = GATHER_S, order: str = "") -> None:
        self.names = tuple(names)
        self.now = 100.0
        self.runs = 0
        self.lives = 0
        self.made = 0
        self.in_: set[tuple[wire.EpochId, str]] = set()
        """Who has said that he is in which epoch."""
        self.stuck: set[str] = set()
        """Lives that never get in."""
        self.loss: Loss = ""
        self.down = False
        self.groups = Groups("run-0", self.now)
        self.terms = wire.Terms(self.names, least, gather_s, FORM_S)
        self.members: dict[str, Member] = {}
        self.order = tuple(order or names)
        self.ids: dict[tuple[str, int], bytes] = {}
        self.ranks: dict[tuple[str, int], tuple[str, ...]] = {}
        self.late: list[tuple[str, msgspec.Struct]] = []
        """Copies of messages that may arrive again, at any time."""

    # Faults ----------------------------------------------------------------------------------------------------------

    def born(self, name: str) -> None:
        """A worker starts, in the place of its former life if there is one."""
        self.lives += 1
        self.members[name] = Member(wire.Attendee(name, f"life-{self.lives}"), self.terms)

    def kill(self, name: str, silently: bool = False) -> None:
        """A worker dies; its connection breaks, unless the machine dies with it."""
        self.members[name].stage = "gone"
        group = self.groups.find(GROUP)
        if group is not None and not silently and not self.down:
            seat = group.poll_opened(self.members[name].who)
            if seat is not None:
                group.poll_closed(seat, False, self.now)

    def restart(self) -> None:
        """The controller is killed and comes back, knowing nothing."""
        self.runs += 1
        self.groups = Groups(f"run-{self.runs}", self.now)

    def get_stuck(self, name: str) -> None:
        """This life of a member will say that it lives and never that it is in, until it is replaced or dies."""
        self.stuck.add(self.members[name].who.life)

    def fails(self, name: str, blamed: tuple[str, ...] = ()) -> None:
        """A member's communicator fails."""
        member = self.members[name]
        if member.epoch is not None:
            message = wire.Failed(member.who, member.epoch, "it broke", blamed)
            self.say("failed", message)
            member.done_with()

    def again(self, number: int) -> None:
        """A copy of an old message arrives."""
        if self.late and not self.down:
            message = self.late[number % len(self.late)][1]
            self._handle(message)
            self.check()

    # Time ------------------------------------------------------------------------------------------------------------

    def step(self, name: str) -> bool:
        """A member says what it has to say now; whether it said anything."""
        member = self.members.get(name)
        if member is None or member.stage == "gone" or self.down:
            return False
        said = self._step(member)
        self.check()
        return said

    def wait(self, seconds: float) -> None:
        """Time passes: members hold their epochs, the controller ticks."""
        until = self.now + seconds
        while self.now < until:
            self.now += TICK_S
            if not self.down:
                self.groups.tick(_alive, self.now)
                group = self.groups.find(GROUP)
                if group is not None and group.epoch is not None and group.epoch.state == "open":
                    assert self.now < group.epoch.form_at, "open for too long"
            for name in self.order:
                self.step(name)
            self.check()

    def settle(self) -> None:
        """No more faults: everybody who lives ends up in one formed epoch, if they are enough."""
        self.loss, self.down = "", False
        self.stuck.clear()
        self.wait(limits.GROUP_LEASE_S + WAIT_S + TICK_S)  # whoever is no more is not taken for alive from now on
        until = self.now + QUIET_S
        while not self.is_settled() and self.now < until:
            self.wait(TICK_S)
        alive, inside = self.alive(), self.inside()
        if len(alive) >= self.terms.least:
            group = self.groups.find(GROUP)
            assert inside == alive, (self.state(), group and group.status())
            assert len({self.members[name].epoch for name in alive}) == 1, self.state()
            assert {self.members[name].ranks for name in alive} == {tuple(sorted(alive))}, self.state()
        else:
            assert not inside, self.state()

    def alive(self) -> set[str]:
        return {name for name, member in self.members.items() if member.stage != "gone"}

    def inside(self) -> set[str]:
        """Who is in an epoch that has formed."""
        return {name for name, member in self.members.items() if member.stage == "in" and member.formed}

    def is_settled(self) -> bool:
        """Whether everybody who lives is in one epoch, or they are too few."""
        alive = self.alive()
        if len(alive) < self.terms.least:
            return not self.inside()
        return self.inside() == alive and len({self.members[name].epoch for name in alive}) == 1

    def state(self) -> list[tuple[str, Stage, wire.EpochId | None, bool]]:
        return [(m.name, m.stage, m.epoch, m.formed) for m in self.members.values()]

    # Promises --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Of every epoch: one id, one order of ranks. Of every member: never an earlier epoch again."""
        for member in self.members.values():
            if member.epoch is None or member.stage == "gone":
                continue
            key = (member.epoch.run, member.epoch.number)
            assert self.ranks.setdefault(key, member.ranks) == member.ranks, "two orders of ranks"
            assert member.name in member.ranks, "a member of an epoch that it is not in"
            if member.group_id and member.stage in ("joining", "in"):
                assert self.ids.setdefault(key, member.group_id) == member.group_id, "two ids of one epoch"
            assert member.epoch.number > member.after, "an epoch that it has done with"
        group = self.groups.find(GROUP)
        if group is not None and group.epoch is not None and not group.epoch.adopted:
            key = (group.epoch.id.run, group.epoch.id.number)
            assert self.ranks.setdefault(key, group.epoch.ranks) == group.epoch.ranks, "two orders of ranks"
            if group.epoch.state == "formed":
                assert all((group.epoch.id, name) in self.in_ for name in group.epoch.ranks), "formed without some"

    # What members do -------------------------------------------------------------------------------------------------

    def say(self, what: str, message: msgspec.Struct) -> msgspec.Struct | Refusal | None:
        """One question and its answer; None when either is lost."""
        self.late.append((what, message))
        del self.late[:-40]
        loss, self.loss = self.loss, ""
        if loss == "request" or self.down:
            return None
        answer = self._handle(message)
        if loss == "twice":
            answer = self._handle(message)
        return None if loss == "reply" else answer

    def _step(self, member: Member) -> bool:
        match member.stage:
            case "meeting":
                return self._meet(member)
            case "making":
                self.made += 1  # another one each time: which of them counts is the controller's to say
                member.group_id = f"id-{self.made}".encode()
                assert member.epoch is not None
                answer = self.say("give_id", wire.GiveId(member.who, member.epoch, member.group_id))
                return self._come(member, answer)
            case "joining":
                assert member.epoch is not None
                if member.who.life in self.stuck:
                    return self._hold(member)
                self._note(member, self.say("joined", wire.Joined(member.who, member.epoch)))
                return True
            case _:
                return self._hold(member)

    def _meet(self, member: Member) -> bool:
        answer = self.say("meet", wire.Meet(member.who, member.terms, member.after, WAIT_S))
        if isinstance(answer, wire.Create):
            member.epoch, member.ranks, member.stage = answer.epoch, answer.ranks, "making"
            return True
        return self._come(member, answer)

    def _come(self, member: Member, answer: object) -> bool:
        if isinstance(answer, Refusal):
            if answer.code in ("replaced", "left"):
                member.stage = "gone"
            else:
                member.done_with()
        if not isinstance(answer, wire.Come):
            return False
        member.epoch, member.ranks, member.group_id, member.stage = (
            answer.epoch,
            answer.ranks,
            answer.group_id,
            "joining",
        )
        return True

    def _hold(self, member: Member) -> bool:
        assert member.epoch is not None
        known: Literal["open", "formed"] = "formed" if member.formed else "open"
        message = wire.Hold(member.who, member.terms, member.epoch, member.ranks, known, WAIT_S)
        before = member.formed
        self._note(member, self.say("hold", message))
        return member.formed != before or member.stage != "in"

    def _note(self, member: Member, answer: object) -> None:
        if isinstance(answer, Refusal) or (isinstance(answer, wire.Progress) and answer.state == "ended"):
            member.done_with()
        elif isinstance(answer, wire.Progress) and member.who.life not in self.stuck:
            member.stage = "in"
            member.formed = member.formed or answer.state == "formed"

    def _handle(self, message: msgspec.Struct) -> msgspec.Struct | Refusal | None:
        """What groups_api.py does, without waiting."""
        groups, told, now = self.groups, recoded(message), self.now
        group = groups.find(GROUP)
        if group is not None and isinstance(told, wire.GiveId | wire.Joined | wire.Failed):
            epoch = group.epoch
            if epoch is None or not epoch.is_live or epoch.id != told.epoch:
                before = repr(vars(group))
                assert isinstance(self._tell(group, told), Refusal), "something old was taken"
                assert repr(vars(group)) == before, "something old changed something"
            elif isinstance(told, wire.Joined) and epoch.group_id is not None:
                self.in_.add((told.epoch, told.who.name))
        if isinstance(told, wire.Meet):
            refused = groups.meet(GROUP, told, now)
            group = groups.find(GROUP)
            answer = None if group is None else group.answer_to(told.who)
            return refused or answer or wire.Waiting()
        if isinstance(told, wire.Hold):
            refused = groups.hold(GROUP, told, now)
            group = groups.find(GROUP)
            return refused if group is None or refused is not None else group.progress(told.epoch)
        group = groups.find(GROUP)
        if group is None:
            return Refusal(409, "stale", "no group")
        return self._tell(group, told)

    def _tell(self, group: Group, told: msgspec.Struct) -> msgspec.Struct | Refusal | None:
        now = self.now
        if isinstance(told, wire.GiveId):
            return group.give_id(told, now) or group.answer_to(told.who)
        if isinstance(told, wire.Joined):
            return group.joined(told.who, told.epoch, now) or group.progress(told.epoch)
        if isinstance(told, wire.Failed):
            return group.failed(told, now)
        assert isinstance(told, wire.Leave)
        group.leave(told.who, now)
        return None


def _alive(who: wire.Attendee) -> Standing:
    return "alive"


def rounds(world: World, most: int = 60) -> Iterator[Callable[[], None]]:
    """The steps of a fault-free run, one by one: each member in turn, until all are in; time passes between rounds."""
    for _ in range(most):
        for name in world.order:
            yield lambda name=name: world.step(name)  # type: ignore[misc]
        yield lambda: world.wait(TICK_S)
