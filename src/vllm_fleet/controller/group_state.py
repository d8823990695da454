"""What is known of one group: its seats and its epoch; and what members are told of it. group.py decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vllm_fleet.wire.groups import Attendee, Come, Create, EpochId, EpochState, GroupStatus, Progress, Terms

Standing = Literal["alive", "suspect", "gone"]
"""How the instance of a worker stands, as the fleet's membership has it."""


class Refusal(NamedTuple):
    """What was asked changes nothing."""

    status: int
    code: str
    error: str


class News(NamedTuple):
    """What happened to a group; ``event`` is one of the log's, or empty where the log need not have it."""

    event: str
    epoch: int
    detail: str = ""


class Numbers:
    """Numbers of epochs: none is given twice in one run of a controller, nor one that a member has known before."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._last = 0

    def seen(self, number: int) -> None:
        """A member knows an epoch of this number."""
        self._last = max(self._last, number)

    def next(self) -> EpochId:
        self._last += 1
        return EpochId(self.run, self._last)


@dataclass
class Seat:
    """A member that is believed to live."""

    who: Attendee
    terms: Terms
    lease_at: float
    after: int = 0
    """It has done with the epochs up to this one."""
    waiting: bool = False
    """It is here for the next epoch."""
    polls: int = 0
    """Its questions that wait for something to happen."""
    suspect_at: float | None = None
    """Since when its instance is suspect."""


@dataclass
class Epoch:
    """The present epoch, or the last one."""

    id: EpochId
    ranks: tuple[str, ...]
    form_at: float
    state: EpochState = "open"
    group_id: bytes | None = None
    joined: set[str] = field(default_factory=set)
    reason: str = ""
    unheard: set[str] = field(default_factory=set)
    """Of an epoch that another run opened: who has yet to say that it is in it, until ``heard_by``."""
    heard_by: float = float("inf")
    adopted: bool = False

    @property
    def is_live(self) -> bool:
        return self.state != "ended"


class GroupState:
    """Seats by name, and one epoch. ``news``: what happened, for the log and for those who wait."""

    def __init__(self, name: str, numbers: Numbers) -> None:
        self.name = name
        self.seats: dict[str, Seat] = {}
        self.epoch: Epoch | None = None
        self.news: list[News] = []
        self.empty_at: float | None = None
        """Since when nobody is in it."""
        self.numbers = numbers
        self.out: set[str] = set()
        """Members that are not waited for: they died, left or were blamed, and have not come again."""

    def answer_to(self, who: Attendee) -> Create | Come | None:
        """What a member that is here is to do; None: wait."""
        epoch, seat = self.epoch, self.seats.get(who.name)
        if epoch is None or not epoch.is_live or epoch.adopted or seat is None or seat.who.life != who.life:
            return None
        if who.name not in epoch.ranks or seat.after >= epoch.id.number:
            return None
        if epoch.group_id is not None:
            return Come(epoch.id, epoch.ranks, epoch.group_id)
        return Create(epoch.id, epoch.ranks) if epoch.ranks[0] == who.name else None

    def progress(self, epoch_id: EpochId) -> Progress:
        """How an epoch stands."""
        epoch = self.epoch
        if epoch is None or epoch.id != epoch_id:
            return Progress("ended", (), "a later epoch took its place")
        return Progress(epoch.state, self.missing(), epoch.reason)

    def missing(self) -> tuple[str, ...]:
        """Who has not joined the present epoch."""
        epoch = self.epoch
        return tuple(sorted(set(epoch.ranks) - epoch.joined)) if epoch is not None and epoch.is_live else ()

    def here(self) -> set[str]:
        """Who waits for the next epoch."""
        return {name for name, seat in self.seats.items() if seat.waiting}

    def awaited(self) -> set[str]:
        """For whom they wait."""
        return self.names() - self.out - self.here()

    def status(self) -> GroupStatus:
        """All of it, for people."""
        epoch = self.epoch
        live = epoch is not None and epoch.is_live
        return GroupStatus(
            self.name,
            epoch.state if epoch is not None and epoch.state != "ended" else "gathering",
            epoch.id if epoch is not None else EpochId(self.numbers.run, 0),
            epoch.ranks if epoch is not None and live else (),
            self.missing(),
            tuple(sorted(self.here())),
            () if live else tuple(sorted(self.awaited())),
            epoch.reason if epoch is not None else "",
        )

    def names(self) -> set[str]:
        """Everybody whom somebody here names as a member."""
        return {name for seat in self.seats.values() for name in seat.terms.members}
