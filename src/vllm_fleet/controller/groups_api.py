"""The controller's calls about groups of workers; wire/groups.py has the messages, docs/groups.md the protocol.

A question that has to wait is a feed of one part: the HTTP layer tells at once when whoever asked is gone, which is how
the death of a waiting member shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from msgspec import Struct

from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.exchange import answer_json, refusal
from vllm_fleet.controller.group import Group
from vllm_fleet.controller.group_state import Refusal, Seat, Standing
from vllm_fleet.controller.groups import Groups
from vllm_fleet.controller.routes import Route, Taking
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest, Busy
from vllm_fleet.net.http.messages import JSON, Answer, Handled, Outlet, Request
from vllm_fleet.wire import groups as wire
from vllm_fleet.wire.names import Name


class GroupsApi:
    """Meeting, joining, holding, failing, leaving. Made where the event loop runs."""

    def __init__(self, engine: Engine, env: Env) -> None:
        self._engine, self._env = engine, env
        self._groups = Groups(env.new_id(), env.now())
        self._polls: dict[str, set[Poll]] = {}
        self._polls_count = 0
        self._ticker: asyncio.TimerHandle | None = None
        self._ended = False

    def routes(self) -> list[Route]:
        at = "/v1/groups/{name}"
        return [
            Route("POST", f"{at}/meet", Taking(wire.Meet, self.meet), {200: wire.MeetAnswer}),
            Route("POST", f"{at}/id", Taking(wire.GiveId, self.give_id), {200: wire.Come}),
            Route("POST", f"{at}/joined", Taking(wire.Joined, self.joined), {200: wire.Progress}),
            Route("POST", f"{at}/hold", Taking(wire.Hold, self.hold), {200: wire.Progress}),
            Route("POST", f"{at}/failed", Taking(wire.Failed, self.failed), {204: None}),
            Route("POST", f"{at}/leave", Taking(wire.Leave, self.leave), {204: None}),
            Route("GET", at, self.status, {200: wire.GroupStatus}),
            Route("GET", "/v1/groups", self.list, {200: wire.GroupList}),
        ]

    def end(self) -> None:
        """Answer whoever waits, and stop looking at leases."""
        self._ended = True
        if self._ticker is not None:
            self._ticker.cancel()
        self._finish_all()

    # Handlers --------------------------------------------------------------------------------------------------------

    def meet(self, request: Request, message: wire.Meet) -> Handled:
        """Be here for a group's next epoch. Answers `create` (make the id) or `come` (join under it) when everybody who
        is awaited has come, `waiting` after `wait_s`. Asked again while that epoch lives: the same answer.

        409: this life has left or was replaced. 404: the instance that it names is no member of the fleet.
        """
        name, now = self._begin(request), self._env.now()
        if self._standing(message.who) == "gone":
            text = f"generation {message.who.generation} of {message.who.instance} is no member of the fleet"
            return refusal(404, "unknown", text)
        refused = self._groups.meet(name, message, now)
        group = self._settle(name)
        if refused is not None or group is None:
            return _refused(refused)

        def look() -> Struct | None:
            return group.answer_to(message.who)

        def waiting() -> Struct:
            epoch = group.epoch
            missing = (group.awaited() or group.names()) - group.here() - {message.who.name}
            return wire.Waiting(tuple(sorted(missing))[: limits.GROUP_MEMBERS_MAX], epoch.reason if epoch else "")

        return self._wait(name, message.who, message.wait_s, look, waiting)

    def give_id(self, request: Request, message: wire.GiveId) -> Handled:
        """Hand in the id that rank 0 made for an epoch. 409: not the present epoch, or it has another id."""
        group, refused = self._tell(request, lambda group, now: group.give_id(message, now))
        return _refused(refused) if group is None else answer_json(group.answer_to(message.who))

    def joined(self, request: Request, message: wire.Joined) -> Handled:
        """Say that one's communicator stands. 409: not the present epoch."""
        group, refused = self._tell(request, lambda group, now: group.joined(message.who, message.epoch, now))
        return _refused(refused) if group is None else answer_json(group.progress(message.epoch))

    def hold(self, request: Request, message: wire.Hold) -> Handled:
        """Be in an epoch, and learn when it has formed or ended: answers as soon as it is no more as `known`, at the
        latest after `wait_s`. Whoever does not ask again in time counts as dead. 409: not the present epoch.
        """
        name = self._begin(request)
        refused = self._groups.hold(name, message, self._env.now())
        group = self._settle(name)
        if refused is not None or group is None:
            return _refused(refused)

        def now_is() -> wire.Progress:
            return group.progress(message.epoch)

        def look() -> Struct | None:
            progress = now_is()
            return None if progress.state == message.known else progress

        return self._wait(name, message.who, message.wait_s, look, now_is)

    def failed(self, request: Request, message: wire.Failed) -> Handled:
        """Say that one's communicator failed: the epoch ends, the others learn it. 409: not the present epoch."""
        group, refused = self._tell(request, lambda group, now: group.failed(message, now))
        return _refused(refused) if group is None else Answer(204)

    def leave(self, request: Request, message: wire.Leave) -> Handled:
        """Leave a group for good; the same answer when this life has left already."""
        group = self._groups.find(self._begin(request))
        if group is not None:
            group.leave(message.who, self._env.now())
            self._settle(group.name)
        return Answer(204)

    def status(self, request: Request) -> Handled:
        """How a group stands."""
        group = self._groups.find(self._begin(request))
        return _refused(None) if group is None else answer_json(group.status())

    def list(self, request: Request) -> Handled:
        """All groups."""
        self._engine.check_leads()
        return answer_json(wire.GroupList(tuple(group.status() for group in self._groups.all.values())))

    # Its own ---------------------------------------------------------------------------------------------------------

    def _begin(self, request: Request) -> str:
        self._engine.check_leads()
        if self._ended:
            raise Busy("the controller is stopping")
        try:
            return msgspec.convert(request.params["name"], type=Name)
        except msgspec.ValidationError as error:
            raise BadRequest(f"the group's name is not what it must be: {error}") from error

    def _tell(
        self, request: Request, act: Callable[[Group, float], Refusal | None]
    ) -> tuple[Group | None, Refusal | None]:
        """The group, if it took what was said."""
        name = self._begin(request)
        group = self._groups.find(name)
        if group is None:
            return None, Refusal(409, "stale", f"there is no group {name}; nothing was changed")
        refused = act(group, self._env.now())
        self._settle(name)
        return (group if refused is None else None), refused

    def _settle(self, name: str) -> Group | None:
        """Log what happened to a group, and tell those who wait for it."""
        group = self._groups.find(name)
        if group is None:
            return None
        if self._ticker is None and not self._ended:
            self._ticker = asyncio.get_running_loop().call_later(limits.GROUP_TICK_S, self._tick)
        news, group.news = group.news, []
        for one in news:
            if one.event:
                log.event(one.event, group=name, epoch=one.epoch, detail=one.detail)
        if news:
            for poll in list(self._polls.get(name, ())):
                poll.look()
        return group

    def _wait(
        self,
        name: str,
        who: wire.Attendee,
        wait_s: float,
        look: Callable[[], Struct | None],
        late: Callable[[], Struct],
    ) -> Handled:
        answer = look()
        if answer is not None or wait_s <= 0:
            return answer_json(late() if answer is None else answer)
        if self._polls_count >= limits.GROUP_POLLS_MAX:
            raise Busy(f"{limits.GROUP_POLLS_MAX} members wait already, the most who may")
        group = self._groups.find(name)
        seat = None if group is None else group.poll_opened(who)
        poll = Poll(look, late, self._env.now() + wait_s, lambda done: self._closed(name, done, group, seat))
        self._polls.setdefault(name, set()).add(poll)
        self._polls_count += 1
        return poll

    def _closed(self, name: str, poll: Poll, group: Group | None, seat: Seat | None) -> None:
        self._polls_count -= 1
        self._polls[name].discard(poll)
        if not self._polls[name]:
            del self._polls[name]
        if group is not None and seat is not None:
            group.poll_closed(seat, poll.answered, self._env.now())

    def _tick(self) -> None:
        self._ticker = None
        now = self._env.now()
        if not self._engine.leads():
            self._finish_all()  # they will ask whoever leads
        else:
            self._groups.tick(self._standing, now)
        for polls in list(self._polls.values()):
            for poll in [one for one in polls if now >= one.until]:
                poll.finish()
        for name in list(self._groups.all):
            self._settle(name)

    def _finish_all(self) -> None:
        for polls in list(self._polls.values()):
            for poll in list(polls):
                poll.finish()

    def _standing(self, who: wire.Attendee) -> Standing:
        if not who.instance:
            return "alive"
        member = self._engine.state.members.get(who.instance)
        if member is None or member.generation != who.generation:
            return "gone"
        return "suspect" if member.state == "suspect" else "alive"


class Poll:
    """A question that waits: a Feed of one part. ``look``: the answer once there is one; ``late``: that at ``until``.

    ``answered``: whether it was, when ``closed`` is called.
    """

    content_type = JSON

    def __init__(
        self,
        look: Callable[[], Struct | None],
        late: Callable[[], Struct],
        until: float,
        closed: Callable[[Poll], None],
    ) -> None:
        self.until = until
        self.answered = False
        self._look, self._late, self._closed = look, late, closed
        self._outlet: Outlet | None = None

    def look(self) -> None:
        """Answer if there is an answer."""
        answer = None if self.answered else self._look()
        if answer is not None:
            self._answer(answer)

    def finish(self) -> None:
        """Answer now, with how it stands."""
        if not self.answered:
            self._answer(self._late())

    def on_open(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self.look()

    def on_room(self) -> None:
        pass

    def on_closed(self) -> None:
        self._outlet = None
        self._closed(self)

    def _answer(self, answer: Struct) -> None:
        if self._outlet is not None:
            self.answered = True
            self._outlet.write(wire.encode(answer))
            self._outlet.end()


def _refused(refused: Refusal | None) -> Answer:
    if refused is None:
        return refusal(404, "unknown", "there is no such group")
    return refusal(refused.status, refused.code, refused.error)
