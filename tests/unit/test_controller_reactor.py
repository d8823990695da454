"""The controller's decisions: whole effect lists, one event at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_fleet.controller import reactor
from vllm_fleet.controller.effects import Announce, Broadcast, Effect, Persist, Reply, Save
from vllm_fleet.controller.reactor import on_deregister, on_heartbeat, on_register, on_tick, settle, to_save
from vllm_fleet.controller.state import Entry, FleetState, Rules
from vllm_fleet.controller.wishes import on_drain
from vllm_fleet.core import limits
from vllm_fleet.wire.control import (
    Change,
    Drain,
    ErrorBody,
    Heartbeat,
    HeartbeatAck,
    Member,
    Register,
    Registered,
    ReportedState,
    State,
)

RULES = Rules(heartbeat_s=0.5, suspect_s=1.5, lease_s=10.0)


@pytest.fixture
def state() -> FleetState:
    return FleetState("journal-1", RULES, ticked=0.0)


def hello(name: str = "a", life: str = "life-1", state: ReportedState = "starting", port: int = 1) -> Register:
    return Register(name, "both", f"http://127.0.0.1:{port}", 7, life, state)


def member(generation: int, state: State, name: str = "a", life: str = "life-1", port: int = 1) -> Member:
    return Member(name, "both", f"http://127.0.0.1:{port}", 7, life, generation, state)


def change(revision: int, one: Member, *, left: bool = False, required: bool = False) -> list[Effect]:
    return [Persist(Entry(Change(revision, one), left), required), Broadcast(Change(revision, one))]


def registered(generation: int, revision: int) -> Reply:
    return Reply(200, Registered(generation, revision, 0.5, 10.0))


def joined(state: FleetState, request: Register, now: float = 0.0) -> int:
    """Register and settle; the generation."""
    done = settle(state, on_register(state, request, now), now)
    assert isinstance(done[-1], Reply)
    assert isinstance(done[-1].body, Registered), done
    return done[-1].body.generation


def listen(state: FleetState, until: float) -> Iterator[list[Effect]]:
    """Tick as the controller does, from its last tick on; what each tick did."""
    while state.ticked + RULES.tick_s <= until:
        now = state.ticked + RULES.tick_s
        effects = on_tick(state, now)
        settle(state, effects, now)
        yield effects


def refused(effects: list[Effect]) -> tuple[int, str]:
    (reply,) = effects
    assert isinstance(reply, Reply)
    assert isinstance(reply.body, ErrorBody)
    return reply.status, reply.body.code


# Registration ------------------------------------------------------------------------------------------------------


def test_first_registration_is_saved_told_and_answered(state: FleetState) -> None:
    effects = on_register(state, hello(), 0.0)
    assert effects == [*change(1, member(1, "starting"), required=True), registered(1, 1)]
    assert state.members == {}, "nothing changes before it is saved"
    assert to_save(state, effects) == [Entry(Change(1, member(1, "starting")))]
    assert settle(state, effects, 0.0) == effects[1:]
    assert state.members == {"a": member(1, "starting")}


def test_same_incarnation_again_gets_the_same_answer(state: FleetState) -> None:
    first = settle(state, on_register(state, hello(), 0.0), 0.0)[-1]
    assert on_register(state, hello(), 1.0) == [first]
    assert on_register(state, hello(), 2.0) == [first]


def test_new_incarnation_replaces_the_old_and_has_a_larger_generation(state: FleetState) -> None:
    joined(state, hello())
    effects = on_register(state, hello(life="life-2"), 1.0)
    assert effects == [*change(2, member(2, "starting", life="life-2"), required=True), registered(2, 2)]


def test_replaced_life_is_refused_while_the_new_one_lives(state: FleetState) -> None:
    joined(state, hello())
    joined(state, hello(life="life-2"))
    assert refused(on_register(state, hello(), 1.0)) == (409, "replaced")
    assert refused(on_heartbeat(state, "a", Heartbeat(1, "ready"), 1.0)) == (409, "fenced")
    assert refused(on_deregister(state, "a", 1, 1.0)) == (409, "fenced")
    assert state.members == {"a": member(2, "starting", life="life-2")}


def test_replaced_life_may_return_when_the_new_one_is_silent(state: FleetState) -> None:
    """A late copy of a dead life's registration must not keep the living out for good."""
    joined(state, hello(life="living"))
    joined(state, hello(life="dead, delivered late"))
    list(listen(state, 2.0))
    assert state.members["a"].state == "suspect"
    assert joined(state, hello(life="living"), 2.0) == 3


def test_life_that_left_never_returns(state: FleetState) -> None:
    joined(state, hello())
    settle(state, on_deregister(state, "a", 1, 1.0), 1.0)
    assert refused(on_register(state, hello(), 1.1)) == (409, "left")
    assert joined(state, hello(life="life-2")) == 2


def test_life_whose_lease_ended_returns_with_a_larger_generation(state: FleetState) -> None:
    joined(state, hello())
    list(listen(state, 11.0))
    assert state.members == {}
    assert joined(state, hello(), 11.0) == 2


def test_incarnation_with_another_address_is_refused(state: FleetState) -> None:
    joined(state, hello())
    assert refused(on_register(state, hello(port=2), 1.0)) == (409, "incarnation_reused")


def test_address_of_a_living_member_is_refused_and_of_a_silent_one_taken(state: FleetState) -> None:
    joined(state, hello())
    assert refused(on_register(state, hello("b", "life-b"), 0.1)) == (409, "url_taken")
    list(listen(state, 2.0))
    revision = state.revision
    assert on_register(state, hello("b", "life-b"), 2.0) == [
        *change(revision + 1, member(1, "gone"), required=True),
        *change(revision + 2, member(2, "starting", "b", "life-b"), required=True),
        registered(2, revision + 2),
    ]


def test_full_fleet_is_refused(state: FleetState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMBERS_MAX", 1)
    joined(state, hello())
    assert refused(on_register(state, hello("b", "life-b", port=2), 0.0)) == (503, "fleet_full")
    assert joined(state, hello(life="life-2")) == 2, "a known name may still be replaced"


def test_past_lives_are_bounded(state: FleetState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PAST_LIVES_MAX", 3)
    for number in range(9):
        joined(state, hello(life=f"life-{number}"))
    assert list(state.past) == [("a", "life-5"), ("a", "life-6"), ("a", "life-7")]


# Heartbeats --------------------------------------------------------------------------------------------------------


def test_heartbeat_without_news_is_only_answered(state: FleetState) -> None:
    joined(state, hello())
    assert on_heartbeat(state, "a", Heartbeat(1, "starting"), 0.5) == [Reply(200, HeartbeatAck(1))]


def test_heartbeat_with_a_new_state_is_told_once(state: FleetState) -> None:
    joined(state, hello())
    effects = on_heartbeat(state, "a", Heartbeat(1, "ready"), 0.5)
    assert effects == [*change(2, member(1, "ready")), Reply(200, HeartbeatAck(2))]
    settle(state, effects, 0.5)
    assert on_heartbeat(state, "a", Heartbeat(1, "ready"), 0.5) == [Reply(200, HeartbeatAck(2))]


def test_late_heartbeat_does_not_turn_a_life_back(state: FleetState) -> None:
    joined(state, hello())
    settle(state, on_heartbeat(state, "a", Heartbeat(1, "draining"), 0.5), 0.5)
    assert on_heartbeat(state, "a", Heartbeat(1, "ready"), 0.6) == [Reply(200, HeartbeatAck(2))]
    list(listen(state, 2.5))
    assert state.members["a"].state == "suspect"
    assert on_heartbeat(state, "a", Heartbeat(1, "ready"), 2.6)[0] == Persist(Entry(Change(4, member(1, "draining"))))


def test_suspect_is_back_in_its_reported_state_on_the_next_heartbeat(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    list(listen(state, 2.0))
    assert on_heartbeat(state, "a", Heartbeat(1, "ready"), 2.0) == [
        *change(3, member(1, "ready")),
        Reply(200, HeartbeatAck(3)),
    ]


def test_heartbeat_of_an_unknown_name_or_of_a_forgotten_generation_is_told_to_register(state: FleetState) -> None:
    assert refused(on_heartbeat(state, "a", Heartbeat(1, "ready"), 0.0)) == (404, "unknown")
    joined(state, hello())
    assert refused(on_heartbeat(state, "a", Heartbeat(9, "ready"), 0.0)) == (404, "unknown")


def test_deregistration_is_told_once_and_safe_to_repeat(state: FleetState) -> None:
    joined(state, hello())
    effects = on_deregister(state, "a", 1, 1.0)
    assert effects == [*change(2, member(1, "gone"), left=True), Reply(204)]
    settle(state, effects, 1.0)
    assert on_deregister(state, "a", 1, 1.0) == [Reply(204)]


# Silence -----------------------------------------------------------------------------------------------------------


def test_silence_makes_suspect_then_gone_each_told_once(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    told = [effects for effects in listen(state, 30.0) if effects]
    assert told == [change(2, member(1, "suspect")), change(3, member(1, "gone"))]
    assert state.members == {}


def test_silence_is_noticed_in_time(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    for effects in listen(state, 20.0):
        if effects:
            break
    assert RULES.suspect_s <= state.ticked <= RULES.suspect_s + RULES.tick_s


@pytest.mark.parametrize("pause_s", [0.5, 1.0, 1.6, 5.0, 60.0, 3600.0])
def test_nobody_dies_of_a_pause_of_the_controller(state: FleetState, pause_s: float) -> None:
    for number in range(5):
        joined(state, hello(f"m{number}", f"life-{number}", "ready", port=number + 1))
    assert on_tick(state, RULES.tick_s) == []
    assert on_tick(state, RULES.tick_s + pause_s) == [], "no mass death after resume"
    for number in range(5):  # each is heard within its heartbeat interval
        on_heartbeat(state, f"m{number}", Heartbeat(number + 1, "ready"), RULES.tick_s + pause_s + RULES.heartbeat_s)
    assert [effects for effects in listen(state, pause_s + 2.0) if effects] == []


@pytest.mark.parametrize(("members", "beat_s", "silence_s"), [(500, None, 1.5), (1000, 1.0, 3.0), (2100, 2.0, 6.0)])
def test_members_of_a_large_fleet_speak_less_often(
    state: FleetState, members: int, beat_s: float | None, silence_s: float
) -> None:
    """All together a thousand times a second, but each at least five times within its lease."""
    for number in range(members):
        joined(state, hello(f"m{number}", f"life-{number}", "ready", port=number + 1))
    for number in range(members):
        beat = on_heartbeat(state, f"m{number}", Heartbeat(number + 1, "ready"), 0.0)
        assert beat == [Reply(200, HeartbeatAck(members, beat_s))]
    told = [(at, effects) for at in (0.25 * turn for turn in range(1, 36)) if (effects := on_tick(state, at))]
    assert told[0][0] == silence_s, "nobody is suspected before"
    assert len([effect for effect in told[0][1] if isinstance(effect, Broadcast)]) == members


def test_who_is_draining_speaks_as_often_as_at_first(state: FleetState) -> None:
    for number in range(1000):
        joined(state, hello(f"m{number}", f"life-{number}", "ready", port=number + 1))
    settle(state, on_drain(state, "m0", Drain(1), 0.0), 0.0)
    assert on_heartbeat(state, "m0", Heartbeat(1, "ready"), 0.0) == [Reply(200, HeartbeatAck(1001))]


def test_after_a_pause_the_dead_are_still_found(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    on_tick(state, 60.0)
    told = [effects for effects in listen(state, 60.0 + RULES.lease_s + 1) if effects]
    assert told == [change(2, member(1, "suspect")), change(3, member(1, "gone"))]


def test_a_stuttering_controller_still_finds_the_dead(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    now = 0.0
    effects: list[Effect] = []
    while not effects and now < 60.0:
        now += 1.0  # each tick is 0.6 s late
        effects = on_tick(state, now)
    assert effects == change(2, member(1, "suspect"))
    assert now < 5.0


def test_a_clock_that_steps_back_kills_nobody_and_hides_nobody(state: FleetState) -> None:
    state.ticked = 1000.0
    joined(state, hello(state="ready"), 1000.0)
    assert on_tick(state, 400.0) == []
    assert [effects for effects in listen(state, 400.0 + RULES.lease_s - 0.5) if effects] == []
    assert [effects for effects in listen(state, 412.0) if effects] == [change(2, member(1, "gone"))]


# The disk ----------------------------------------------------------------------------------------------------------


def test_registration_that_cannot_be_saved_is_refused_and_not_made(state: FleetState) -> None:
    effects = on_register(state, hello(), 0.0)
    done = settle(state, effects, 0.0, failed=True, new_controller="journal-2")
    assert done == [Announce(state.snapshot()), reactor.NOT_DURABLE]
    assert (state.members, state.revision, state.generation) == ({}, 0, 0)
    assert (state.durable, state.controller) == (False, "journal-2")
    assert on_register(state, hello(), 0.0) == [reactor.NOT_DURABLE]


def test_other_changes_are_made_in_memory_when_they_cannot_be_saved(state: FleetState) -> None:
    joined(state, hello())
    effects = on_heartbeat(state, "a", Heartbeat(1, "ready"), 0.5)
    done = settle(state, effects, 0.5, failed=True, new_controller="journal-2")
    assert done == [Announce(state.snapshot()), Reply(200, HeartbeatAck(2))]
    assert state.members == {"a": member(1, "ready")}
    effects = on_deregister(state, "a", 1, 0.6)
    assert to_save(state, effects) == []
    assert settle(state, effects, 0.6) == effects[1:]


def test_saving_is_tried_again_with_pauses_and_then_joins_go_on(state: FleetState) -> None:
    settle(state, [], 0.0, failed=True, new_controller="journal-2")
    assert on_tick(state, 0.3) == []
    assert on_tick(state, 1.1) == [Save()]
    assert on_tick(state, 1.2) == []
    assert on_tick(state, 2.2) == [Save()]
    reactor.on_saved(state)
    assert on_tick(state, 3.3) == []
    assert joined(state, hello()) == 1


# Watching ----------------------------------------------------------------------------------------------------------


def test_changes_since_a_revision(state: FleetState) -> None:
    for life in ("1", "2", "3"):
        joined(state, hello(life=life))
    revisions = {since: state.changes_since(since) for since in range(5)}
    known = {since: None if found is None else [one.revision for one in found] for since, found in revisions.items()}
    assert known == {0: [1, 2, 3], 1: [2, 3], 2: [3], 3: [], 4: None}
    assert state.changes_since(1, "journal-1") == revisions[1]
    assert state.changes_since(1, "another journal") is None


def test_history_is_bounded_and_older_revisions_need_a_snapshot(state: FleetState) -> None:
    for number in range(limits.HISTORY_MAX + 10):
        joined(state, hello(life=str(number)))
    assert len(state.history) == limits.HISTORY_MAX
    assert state.changes_since(9) is None
    found = state.changes_since(10)
    assert found is not None
    assert len(found) == limits.HISTORY_MAX
