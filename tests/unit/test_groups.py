"""One group, decision by decision, and the calls about groups with the engine and the connections played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vllm_fleet.controller.group_state import Refusal, Standing
from vllm_fleet.controller.groups import Groups
from vllm_fleet.controller.groups_api import GroupsApi, Poll
from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import BadRequest, Busy, NotLeader
from vllm_fleet.fabric.groups.controlled import pair_name
from vllm_fleet.net.http.messages import Answer, Request
from vllm_fleet.wire import groups as wire
from vllm_fleet.wire.groups import Attendee, Come, Create, EpochId, Failed, GiveId, Hold, Meet, Terms
from vllm_fleet.wire.names import Name

BOTH = Terms(("a", "b"))


def who(name: str, life: str = "1", **more: Any) -> Attendee:
    return Attendee(name, f"{name}{life}", **more)


def alive(attendee: Attendee) -> Standing:
    return "alive"


class Table:
    """Groups with a clock that stands still."""

    def __init__(self, run: str = "run") -> None:
        self.now = 10.0
        self.groups = Groups(run, self.now)

    @property
    def group(self) -> Any:
        return self.groups.find("g")

    def meet(self, name: str, terms: Terms = BOTH, after: int = 0, **more: Any) -> Refusal | None:
        return self.groups.meet("g", Meet(who(name, **more), terms, after), self.now)

    def form(self, *names: str) -> EpochId:
        terms = Terms(names)
        for name in names:
            assert self.meet(name, terms) is None
        epoch: EpochId = self.group.epoch.id
        assert self.group.give_id(GiveId(who(names[0]), epoch, b"id"), self.now) is None
        for name in names:
            assert self.group.joined(who(name), epoch, self.now) is None
        assert self.group.epoch.state == "formed"
        return epoch

    def pass_time(self, seconds: float, standing: Any = alive) -> None:
        for _ in range(round(seconds / limits.GROUP_TICK_S)):
            self.now += limits.GROUP_TICK_S
            self.groups.tick(standing, self.now)


@pytest.fixture
def table() -> Table:
    return Table()


def code(refused: Refusal | None) -> str:
    return "" if refused is None else f"{refused.status} {refused.code}"


def test_from_meeting_to_the_next_epoch(table: Table) -> None:
    table.meet("b")
    assert table.group.answer_to(who("b")) is None
    assert table.group.awaited() == {"a"}
    table.meet("a")
    epoch = EpochId("run", 1)
    assert table.group.answer_to(who("a")) == Create(epoch, ("a", "b"))
    assert table.group.answer_to(who("b")) is None
    assert table.group.give_id(GiveId(who("a"), epoch, b"id"), table.now) is None
    assert table.group.answer_to(who("b")) == Come(epoch, ("a", "b"), b"id")
    table.group.joined(who("b"), epoch, table.now)
    assert table.group.progress(epoch) == wire.Progress("open", ("a",))
    table.group.joined(who("a"), epoch, table.now)
    assert table.group.progress(epoch) == wire.Progress("formed")
    assert table.group.failed(Failed(who("b"), epoch, "cable"), table.now) is None
    assert table.group.progress(epoch) == wire.Progress("ended", (), "b reports: cable")
    table.meet("a", after=1)
    table.meet("b", after=1)
    assert table.group.answer_to(who("a")) == Create(EpochId("run", 2), ("a", "b"))


def test_an_epoch_has_one_id_and_only_rank_0_gives_it(table: Table) -> None:
    table.meet("a"), table.meet("b")
    epoch = table.group.epoch.id
    assert code(table.group.give_id(GiveId(who("b"), epoch, b"id"), table.now)) == "409 not_rank_0"
    assert code(table.group.joined(who("b"), epoch, table.now)) == "409 stale"
    assert code(table.group.give_id(GiveId(who("a"), epoch, b"id"), table.now)) == ""
    assert code(table.group.give_id(GiveId(who("a"), epoch, b"id"), table.now)) == ""
    assert code(table.group.give_id(GiveId(who("a"), epoch, b"di"), table.now)) == "409 id_given"
    assert table.group.epoch.group_id == b"id"


def test_nothing_of_an_older_epoch_or_run_changes_anything(table: Table) -> None:
    old = table.form("a", "b")
    table.meet("a", after=1), table.meet("b", after=1)
    present = table.group.epoch.id
    for epoch in (old, EpochId("other run", present.number), EpochId("run", 99)):
        assert code(table.group.give_id(GiveId(who("a"), epoch, b"old"), table.now)) == "409 stale"
        assert code(table.group.joined(who("a"), epoch, table.now)) == "409 stale"
        assert code(table.group.failed(Failed(who("a"), epoch), table.now)) == "409 stale"
        assert code(table.groups.hold("g", Hold(who("a"), BOTH, epoch, ("a", "b")), table.now)) == "409 stale"
    assert (table.group.epoch.id, table.group.epoch.state, table.group.epoch.group_id) == (present, "open", None)


def test_a_life_that_was_replaced_or_has_left_cannot_come_back(table: Table) -> None:
    epoch = table.form("a", "b")
    table.meet("a", life="2")
    assert table.group.epoch.reason == "a was replaced by a new life"
    assert code(table.meet("a")) == "409 replaced"
    assert code(table.groups.hold("g", Hold(who("a"), BOTH, epoch, ("a", "b")), table.now)) == "409 replaced"
    table.group.leave(who("a", "2"), table.now)
    assert code(table.meet("a", life="2")) == "409 left"
    assert code(table.meet("a", life="3")) == ""


def test_an_older_generation_does_not_replace_a_later_one(table: Table) -> None:
    table.meet("a", life="2", instance="x", generation=5)
    assert code(table.meet("a", life="1", instance="x", generation=4)) == "409 replaced"
    assert code(table.meet("a", life="3", instance="x", generation=6)) == ""


def test_another_life_of_a_member_does_not_hold_its_seat(table: Table) -> None:
    epoch = table.form("a", "b")
    assert code(table.groups.hold("g", Hold(who("a", "9"), BOTH, epoch, ("a", "b")), table.now)) == "409 stale"
    assert code(table.group.joined(who("a", "9"), epoch, table.now)) == "409 stale"
    table.group.leave(who("a", "9"), table.now)
    assert table.group.epoch.state == "formed"


def test_numbers_go_on_from_what_members_know(table: Table) -> None:
    table.meet("a", after=41), table.meet("b")
    assert table.group.epoch.id.number == 42
    assert table.groups.hold("h", Hold(who("a"), BOTH, EpochId("before", 77), ("a", "b"), "formed"), table.now) is None
    table.meet("a", after=42), table.meet("b", after=42)
    assert table.group.epoch.id.number == 78


def test_without_the_missing_after_a_while_but_never_too_few(table: Table) -> None:
    terms = Terms(("a", "b", "c"), least=2, gather_s=1.0)
    table.meet("a", terms)
    table.pass_time(1.5)
    assert not table.group.epoch
    table.meet("b", terms)
    table.pass_time(0.8)
    assert not table.group.epoch
    table.pass_time(0.3)
    assert table.group.epoch.ranks == ("a", "b")
    table.meet("c", terms)
    assert table.group.epoch.reason == "c joins"
    table.meet("a", terms, 1), table.meet("b", terms, 1)
    assert table.group.epoch.ranks == ("a", "b", "c")


def test_all_of_them_where_that_is_asked(table: Table) -> None:
    terms = Terms(("a", "b", "c"), least=3, gather_s=0.0)
    table.meet("a", terms), table.meet("b", terms)
    table.pass_time(2.0)
    assert table.group.epoch is None


def test_somebody_whom_the_others_did_not_name_makes_the_group_larger(table: Table) -> None:
    table.form("a", "b")
    more = Terms(("a", "b", "c"))
    table.meet("c", more)
    table.meet("b", BOTH, 1)
    assert table.group.awaited() == {"a"}
    table.meet("a", BOTH, 1)
    assert table.group.epoch.ranks == ("a", "b", "c")


def test_the_dead_and_the_blamed_are_not_waited_for_and_those_who_return_are(table: Table) -> None:
    epoch = table.form("a", "b", "c")
    terms = Terms(("a", "b", "c"))
    table.group.failed(Failed(who("a"), epoch, "no answer", ("c", "z", "a")), table.now)
    assert table.group.out == {"c"}
    table.meet("a", terms, 1), table.meet("b", terms, 1)
    assert table.group.epoch.ranks == ("a", "b")
    table.meet("c", terms, 1)
    assert table.group.out == set()
    table.meet("a", terms, 2)
    assert table.group.epoch.state == "ended", "b is alive, and waited for"
    assert table.group.awaited() == {"b"}


def test_silence_ends_a_lease_and_with_it_the_epoch(table: Table) -> None:
    epoch = table.form("a", "b")
    for _ in range(5):
        table.pass_time(1.0)
        table.groups.hold("g", Hold(who("a"), BOTH, epoch, ("a", "b"), "formed"), table.now)
    assert table.group.progress(epoch) == wire.Progress("ended", (), "b does not answer")


def test_a_connection_that_breaks_in_a_question_ends_it_sooner(table: Table) -> None:
    epoch = table.form("a", "b")
    first, second = table.group.poll_opened(who("b")), table.group.poll_opened(who("b"))
    table.group.poll_closed(first, False, table.now)
    table.pass_time(2 * limits.GROUP_RETURN_S)
    assert table.group.epoch.state == "formed", "it has asked again on another connection"
    table.group.poll_closed(second, False, table.now)
    table.pass_time(limits.GROUP_RETURN_S + limits.GROUP_TICK_S)
    assert table.group.progress(epoch).reason == "b does not answer"


@pytest.mark.parametrize(
    ("standing", "after_s", "reason"),
    [("gone", 0.1, "b is no member of the fleet any more"), ("suspect", limits.GROUP_SUSPECT_S + 0.1, "b is suspect")],
)
def test_the_fleets_membership_counts(table: Table, standing: Standing, after_s: float, reason: str) -> None:
    table.form("a", "b")
    for seat in table.group.seats.values():
        seat.lease_at += 100.0
    table.pass_time(after_s, lambda one: standing if one.name == "b" else "alive")
    assert table.group.epoch.reason == reason


def test_an_epoch_that_does_not_form_ends(table: Table) -> None:
    terms = Terms(("a", "b"), form_s=1.0)
    table.meet("a", terms), table.meet("b", terms)
    table.pass_time(1.1)
    assert table.group.epoch.reason == "a, b did not join in time"


def test_a_pause_of_the_controller_counts_against_nobody(table: Table) -> None:
    table.form("a", "b")
    table.now += 60.0
    table.groups.tick(alive, table.now)
    assert table.group.epoch.state == "formed"
    table.pass_time(limits.GROUP_LEASE_S + 0.1)
    assert table.group.epoch.state == "ended"


def test_a_restarted_controller_takes_formed_epochs_over() -> None:
    epoch = Table("before").form("a", "b")
    table = Table("after")
    hold = Hold(who("a"), BOTH, epoch, ("a", "b"), "formed")
    assert code(table.groups.hold("g", msgspec.structs.replace(hold, known="open"), table.now)) == "409 stale"
    assert code(table.groups.hold("g", hold, table.now)) == ""
    assert table.group.progress(epoch) == wire.Progress("formed")
    assert table.group.answer_to(who("a")) is None, "nobody is told to make another id for it"
    assert code(table.groups.hold("g", Hold(who("b"), BOTH, epoch, ("b", "a"), "formed"), table.now)) == "409 stale"
    table.pass_time(0.6 * limits.GROUP_LEASE_S)
    table.groups.hold("g", hold, table.now)
    assert table.group.epoch.state == "formed"
    table.pass_time(0.5 * limits.GROUP_LEASE_S)
    assert "b did not come back" in table.group.epoch.reason
    assert table.group.out == {"b"}


def test_bounds() -> None:
    table = Table()
    names = tuple(f"m{number}" for number in range(limits.GROUP_MEMBERS_MAX))
    assert code(table.meet("m0", Terms(names))) == ""
    assert code(table.meet("x", Terms(("x",)))) == "503 group_full"
    assert code(table.meet("m1", Terms(("m2",)))) == "400 bad_request"
    for number in range(limits.GROUPS_MAX - 1):
        table.groups.meet(f"g{number}", Meet(who("a"), BOTH), table.now)
    assert code(table.groups.meet("one more", Meet(who("a"), BOTH), table.now)) == "503 groups_full"
    for life in range(2 * limits.GROUP_PAST_MAX):
        table.group.leave(who("m0", str(life)), table.now)
    assert len(table.group._past) == limits.GROUP_PAST_MAX
    table.pass_time(limits.GROUP_LEASE_S + limits.GROUP_FORGET_S + 1.0)
    assert not table.groups.all


def test_numbers_are_not_given_twice_to_a_group_that_was_forgotten(table: Table) -> None:
    table.form("a", "b")
    table.pass_time(limits.GROUP_LEASE_S + limits.GROUP_FORGET_S + 1.0)
    assert table.form("a", "b").number == 2


def test_the_name_of_a_pair_is_the_same_for_both() -> None:
    assert pair_name("a", "b") == pair_name("b", "a") != pair_name("a", "c")
    assert pair_name("a.b", "c") != pair_name("a", "b.c")
    msgspec.convert(pair_name("x" * 64, "y" * 64), Name)


# The calls ------------------------------------------------------------------------------------------------------------


class Outlet:
    """A connection."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.ended = False

    def write(self, part: bytes) -> bool:
        self.parts.append(part)
        return True

    def end(self) -> None:
        self.ended = True

    def cut(self) -> None:
        raise AssertionError("cut off")


class Engine:
    """What the calls need of the controller's engine."""

    def __init__(self) -> None:
        self.leading = True
        self.state = SimpleNamespace(members={})

    def leads(self) -> bool:
        return self.leading

    def check_leads(self) -> None:
        if not self.leading:
            raise NotLeader("another one leads", "http://127.0.0.1:1")


class Api:
    """The calls, by route."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.api = GroupsApi(self.engine, RealEnv())  # type: ignore[arg-type]
        self.routes = {(route.method, route.path): route.handler for route in self.api.routes()}

    def post(self, what: str, message: msgspec.Struct, group: str = "g") -> Any:
        """The answer, or (when it waits) the poll and its connection."""
        request = Request("POST", "", "", {}, "peer", body=wire.encode(message), params={"name": group})
        handled = self.routes["POST", f"/v1/groups/{{name}}/{what}"](request)
        if isinstance(handled, Answer):
            return handled
        assert isinstance(handled, Poll)
        outlet = Outlet()
        handled.on_open(outlet)
        return handled, outlet

    def get(self, group: str = "g") -> Any:
        handled = self.routes["GET", "/v1/groups/{name}"](Request("GET", "", "", {}, "peer", params={"name": group}))
        assert isinstance(handled, Answer)
        return handled


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    made = Api()
    yield made
    made.api.end()


def meet(name: str, wait_s: float = 10.0, **more: Any) -> Meet:
    return Meet(who(name, **more), BOTH, 0, wait_s)


def told(outlet: Outlet) -> Any:
    assert outlet.ended
    return wire.decode_meet_answer(b"".join(outlet.parts))


async def test_whoever_waits_is_told_at_once(api: Api) -> None:
    poll, first = api.post("meet", meet("b"))
    assert not first.parts
    answer = api.post("meet", meet("a"))
    assert isinstance(wire.decode_meet_answer(answer.body), Create)
    created = wire.decode_meet_answer(answer.body)
    assert isinstance(created, Create)
    given = api.post("id", GiveId(who("a"), created.epoch, b"x" * limits.GROUP_ID_BYTES_MAX))
    assert told(first) == wire.decode_come(given.body)
    poll.on_closed()
    hold = Hold(who("a"), BOTH, created.epoch, created.ranks, "open", 10.0)
    _, held = api.post("hold", hold)
    for name in "ab":
        assert api.post("joined", wire.Joined(who(name), created.epoch)).status == 200
    assert wire.decode_progress(b"".join(held.parts)) == wire.Progress("formed")
    status = wire.decode_status(api.get().body)
    assert (status.state, status.ranks) == ("formed", ("a", "b"))


async def test_a_question_ends_after_the_time_that_it_asked_for(api: Api) -> None:
    asked = asyncio.get_running_loop().time()
    _, outlet = api.post("meet", meet("a", wait_s=0.1))
    async with asyncio.timeout(5.0):
        while not outlet.ended:  # noqa: ASYNC110 - a connection has no event to offer
            await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - asked >= 0.1
    assert told(outlet) == wire.Waiting(("b",))
    assert isinstance(api.post("meet", meet("a", wait_s=0.0)), Answer)


async def test_a_waiting_member_whose_connection_breaks_is_lost(api: Api) -> None:
    poll, _ = api.post("meet", meet("a"))
    poll.on_closed()
    async with asyncio.timeout(5.0):
        while wire.decode_status(api.get().body).here:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
    assert isinstance(wire.decode_meet_answer(api.post("meet", meet("b", wait_s=0.0)).body), wire.Waiting)


async def test_who_waits_is_answered_when_the_controller_stops_or_does_not_lead(api: Api) -> None:
    _, outlet = api.post("meet", meet("a"))
    api.engine.leading = False
    with pytest.raises(NotLeader):
        api.post("meet", meet("b"))
    async with asyncio.timeout(5.0):
        while not outlet.ended:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
    api.engine.leading = True
    _, outlet = api.post("meet", meet("a"))
    api.api.end()
    assert told(outlet) == wire.Waiting(("b",))
    with pytest.raises(Busy):
        api.post("meet", meet("a"))


async def test_a_worker_of_no_instance_of_the_fleet_is_refused(api: Api) -> None:
    member = SimpleNamespace(generation=7, state="ready")
    named = Meet(who("a", instance="x", generation=7), BOTH, 0, 0.0)
    assert api.post("meet", named).status == 404
    api.engine.state.members["x"] = member
    assert api.post("meet", named).status == 200
    assert api.post("meet", meet("a", 0.0, life="2", instance="x", generation=6)).status == 404


async def test_hostile_bodies_and_names(api: Api) -> None:
    for name in ("", "a/b", "x" * 65, "\n", ".hidden"):
        with pytest.raises(BadRequest):
            api.post("meet", meet("a"), name)
    for body in (
        b"",
        b"{}",
        b"[" * 10_000,
        wire.encode(meet("a", wait_s=limits.GROUP_WAIT_S_MAX + 1)),
        wire.encode(Meet(who("a"), BOTH, limits.GROUP_EPOCH_MAX + 1)),
        wire.encode(Meet(who("a"), Terms(("a",) * (limits.GROUP_MEMBERS_MAX + 1)))),
        wire.encode(Meet(who("a"), Terms(("a",), gather_s=float("inf")))),
    ):
        with pytest.raises(BadRequest):
            api.routes["POST", "/v1/groups/{name}/meet"](
                Request("POST", "", "", {}, "peer", body=body, params={"name": "g"})
            )
    with pytest.raises(BadRequest):
        api.post("id", GiveId(who("a"), EpochId("r", 1), b"x" * (limits.GROUP_ID_BYTES_MAX + 1)))
    assert api.post("joined", wire.Joined(who("a"), EpochId("r", 1)), "unheard-of").status == 409
    assert api.post("leave", wire.Leave(who("a")), "unheard-of").status == 204
    assert api.get("unheard-of").status == 404
