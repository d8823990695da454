"""One group's decisions: who is here, when an epoch opens, when it ends. Pure; the time is passed in.

What must hold, whatever is lost, doubled or late (tests/unit/test_groups_model.py): an epoch has one id and one order
of ranks; nothing of an older epoch changes a later one; who lives and asks ends up in a formed epoch.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_fleet.controller.group_state import Epoch, GroupState, News, Numbers, Refusal, Seat, Standing
from vllm_fleet.core import limits
from vllm_fleet.wire.groups import Attendee, EpochId, Failed, GiveId, Hold, Meet, Terms


class Group(GroupState):
    """See the module's docstring. What members say returns a Refusal, or None when it was taken."""

    def __init__(self, name: str, numbers: Numbers) -> None:
        super().__init__(name, numbers)
        self._past: dict[tuple[str, str], str] = {}
        """Lives of members that cannot come back, and why."""
        self._gathered_at = 0.0
        """When the last one came for the next epoch."""

    # What members say ------------------------------------------------------------------------------------------------

    def meet(self, message: Meet, now: float) -> Refusal | None:
        """A member is here; ``answer_to`` says what for."""
        who, epoch = message.who, self.epoch
        if refusal := self._refuse_past(who):
            return refusal
        if who.name not in message.terms.members:
            return Refusal(400, "bad_request", f"{who.name} is not among the members that it names")
        seat = self.seats.get(who.name)
        if seat is not None and seat.who.life != who.life and who.generation < seat.who.generation:
            return Refusal(409, "replaced", f"generation {seat.who.generation} of {who.name} is here")
        if len(self.names() | set(message.terms.members)) > limits.GROUP_MEMBERS_MAX:
            return Refusal(503, "group_full", f"a group has {limits.GROUP_MEMBERS_MAX} members at most")
        self.numbers.seen(message.after)
        if seat is not None and seat.who.life != who.life:
            self._remember(seat.who, "replaced")
            self._lose(who.name, "was replaced by a new life", now)
            seat = None
        if seat is None:
            seat = self._sit(who, message.terms, now)
            known = False
        else:
            known = epoch is not None and who.name in epoch.ranks and not epoch.adopted
        seat.who, seat.terms, seat.after = who, message.terms, max(seat.after, message.after)
        self._renew(seat, message.wait_s, now)
        if epoch is not None and epoch.is_live:
            if known and seat.after < epoch.id.number:
                return None  # a question that was repeated
            self._end(f"{who.name} asks for the next epoch" if who.name in epoch.ranks else f"{who.name} joins")
        if not seat.waiting:
            seat.waiting, self._gathered_at = True, now
        self._open_if_ready(now)
        return None

    def give_id(self, message: GiveId, now: float) -> Refusal | None:
        """Rank 0 has made the id."""
        if refusal := self._refuse_stale(message.who, message.epoch):
            return refusal
        epoch = self._live()
        if epoch.ranks[0] != message.who.name:
            return Refusal(409, "not_rank_0", f"{epoch.ranks[0]} makes the id of epoch {epoch.id.number}")
        if epoch.group_id is None and not epoch.adopted:
            epoch.group_id = message.group_id
            self.news.append(News("", epoch.id.number))
        elif epoch.group_id != message.group_id:
            return Refusal(409, "id_given", f"epoch {epoch.id.number} has another id already")
        self._renew(self.seats[message.who.name], 0.0, now)
        return None

    def joined(self, who: Attendee, epoch_id: EpochId, now: float) -> Refusal | None:
        """A member's communicator stands."""
        if refusal := self._refuse_stale(who, epoch_id):
            return refusal
        epoch = self._live()
        if epoch.group_id is None and not epoch.adopted:
            return Refusal(409, "stale", f"epoch {epoch.id.number} has no id yet, so nobody can have joined it")
        self._renew(self.seats[who.name], 0.0, now)
        epoch.joined.add(who.name)
        if epoch.state == "open" and epoch.joined.issuperset(epoch.ranks):
            epoch.state = "formed"
            self.news.append(News("group.formed", epoch.id.number))
        return None

    def hold(self, message: Hold, now: float) -> Refusal | None:
        """A member is in an epoch, and goes on to be."""
        who = message.who
        if refusal := self._refuse_past(who):
            return refusal
        if self.epoch is None and not self.seats and self._may_adopt(message):
            self._adopt(message, now)
        epoch = self.epoch
        if epoch is None or epoch.id != message.epoch or epoch.ranks != message.ranks or who.name not in epoch.ranks:
            return _stale(message.epoch, epoch)
        if not epoch.is_live:
            return None
        if who.name in epoch.unheard:
            epoch.unheard.discard(who.name)
            self._sit(who, message.terms, now)
        seat = self.seats.get(who.name)
        if seat is None or seat.who.life != who.life:
            return _stale(message.epoch, epoch)
        self._renew(seat, message.wait_s, now)
        return None

    def failed(self, message: Failed, now: float) -> Refusal | None:
        """A member's communicator failed."""
        if refusal := self._refuse_stale(message.who, message.epoch):
            return refusal
        name = message.who.name
        self._renew(self.seats[name], 0.0, now)
        self._end(f"{name} reports: {message.reason}" if message.reason else f"{name} reports a failure")
        for blamed in set(message.blamed) & set(self._live().ranks) - {name}:
            self._lose(blamed, "was blamed", now)
        return None

    def leave(self, who: Attendee, now: float) -> None:
        """A member goes for good."""
        self._remember(who, "left")
        seat = self.seats.get(who.name)
        if seat is not None and seat.who.life == who.life:
            self._lose(who.name, "left", now)
            self._open_if_ready(now)

    # Time ------------------------------------------------------------------------------------------------------------

    def poll_opened(self, who: Attendee) -> Seat | None:
        """A question of a member begins to wait. Give the seat to ``poll_closed`` when it ends."""
        seat = self.seats.get(who.name)
        if seat is None or seat.who.life != who.life:
            return None
        seat.polls += 1
        return seat

    def poll_closed(self, seat: Seat, answered: bool, now: float) -> None:
        """It was answered, or its connection broke."""
        seat.polls -= 1
        if not seat.polls:
            seat.lease_at = min(seat.lease_at, now + (limits.GROUP_LEASE_S if answered else limits.GROUP_RETURN_S))

    def tick(self, standing: Callable[[Attendee], Standing], now: float) -> None:
        """Judge silence and deadlines."""
        for name, seat in list(self.seats.items()):
            held = standing(seat.who)
            seat.suspect_at = (now if seat.suspect_at is None else seat.suspect_at) if held == "suspect" else None
            if held == "gone":
                self._lose(name, "is no member of the fleet any more", now)
            elif seat.suspect_at is not None and now - seat.suspect_at >= limits.GROUP_SUSPECT_S:
                self._lose(name, "is suspect", now)
            elif now >= seat.lease_at:
                self._lose(name, "does not answer", now)
        epoch = self.epoch
        if epoch is not None and epoch.is_live:
            if now >= epoch.heard_by and epoch.unheard:
                lost = ", ".join(sorted(epoch.unheard))
                self.out |= epoch.unheard
                self._end(f"{lost} did not come back after a restart of the controller")
            elif epoch.state == "open" and now >= epoch.form_at:
                self._end(f"{', '.join(self.missing())} did not join in time")
        self._open_if_ready(now)
        self.empty_at = None if self.seats else now if self.empty_at is None else self.empty_at

    def shift(self, seconds: float) -> None:
        """Time in which the controller did not listen counts against nobody."""
        self._gathered_at += seconds
        for seat in self.seats.values():
            seat.lease_at += seconds
            seat.suspect_at = None if seat.suspect_at is None else seat.suspect_at + seconds
        if self.epoch is not None:
            self.epoch.form_at += seconds
            self.epoch.heard_by += seconds

    # Its own ---------------------------------------------------------------------------------------------------------

    def _open_if_ready(self, now: float) -> None:
        here = self.here()
        if not here or (self.epoch is not None and self.epoch.is_live):
            return
        terms = [self.seats[name].terms for name in here]
        if len(here) < max(one.least for one in terms):
            return
        if self.awaited() and now < self._gathered_at + max(one.gather_s for one in terms):
            return
        ranks = tuple(sorted(here))
        self.epoch = Epoch(self.numbers.next(), ranks, now + max(one.form_s for one in terms))
        for name in ranks:
            self.seats[name].waiting = False
        self.news.append(News("group.opened", self.epoch.id.number, ", ".join(ranks)))

    def _end(self, reason: str) -> None:
        epoch = self.epoch
        if epoch is None or not epoch.is_live:
            return
        epoch.state, epoch.reason = "ended", reason
        self.news.append(News("group.ended", epoch.id.number, reason))

    def _lose(self, name: str, how: str, now: float) -> None:
        """A member is there no more, until it comes again."""
        self.seats.pop(name, None)
        self.out.add(name)
        self.out &= self.names() | {name}
        if not self.seats:  # whoever comes next awaits everybody
            self.out.clear()
        if self.epoch is not None and name in self.epoch.ranks:
            self._end(f"{name} {how}")

    def _sit(self, who: Attendee, terms: Terms, now: float) -> Seat:
        self.out.discard(who.name)
        seat = self.seats[who.name] = Seat(who, terms, now + limits.GROUP_LEASE_S)
        return seat

    def _may_adopt(self, message: Hold) -> bool:
        """Whether another run of a controller formed this epoch, and nothing has happened in ours."""
        return message.known == "formed" and message.epoch.run != self.numbers.run and message.who.name in message.ranks

    def _adopt(self, message: Hold, now: float) -> None:
        ranks = message.ranks
        self.numbers.seen(message.epoch.number)
        self.epoch = Epoch(message.epoch, ranks, now, "formed", joined=set(ranks), unheard=set(ranks), adopted=True)
        self.epoch.heard_by = now + limits.GROUP_LEASE_S
        self.news.append(News("group.formed", message.epoch.number, "opened by another run of a controller"))

    def _renew(self, seat: Seat, wait_s: float, now: float) -> None:
        seat.lease_at = max(seat.lease_at, now + wait_s + limits.GROUP_LEASE_S)

    def _remember(self, who: Attendee, how: str) -> None:
        self._past[(who.name, who.life)] = how
        while len(self._past) > limits.GROUP_PAST_MAX:
            del self._past[next(iter(self._past))]

    def _refuse_past(self, who: Attendee) -> Refusal | None:
        how = self._past.get((who.name, who.life))
        return None if how is None else Refusal(409, how, f"this life of {who.name} {_PAST[how]}; come as a new one")

    def _refuse_stale(self, who: Attendee, epoch_id: EpochId) -> Refusal | None:
        epoch, seat = self.epoch, self.seats.get(who.name)
        if refusal := self._refuse_past(who):
            return refusal
        if epoch is None or epoch.id != epoch_id or not epoch.is_live or who.name not in epoch.ranks:
            return _stale(epoch_id, epoch)
        return _stale(epoch_id, epoch) if seat is None or seat.who.life != who.life else None

    def _live(self) -> Epoch:
        assert self.epoch is not None
        return self.epoch


_PAST = {"left": "has left", "replaced": "was replaced by a later one"}


def _stale(epoch_id: EpochId, present: Epoch | None) -> Refusal:
    now = "none" if present is None else f"{present.id.number}, {present.state}"
    return Refusal(409, "stale", f"epoch {epoch_id.number} is not the present one ({now}); nothing was changed")
