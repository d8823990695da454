"""What the fleet is to be, and members told to leave: whole effect lists."""

from __future__ import annotations

import pytest

from tests.unit.test_controller_reactor import RULES, hello, joined, listen, member, refused
from vllm_fleet.controller import journal, reactor
from vllm_fleet.controller.effects import Announce, Broadcast, Effect, Persist, Reply
from vllm_fleet.controller.reactor import on_heartbeat, on_register, settle
from vllm_fleet.controller.state import Entry, FleetState
from vllm_fleet.controller.wishes import on_desire, on_drain
from vllm_fleet.wire.control import (
    UPSTREAM_CONNECTOR,
    Change,
    Desired,
    Drain,
    Draining,
    Heartbeat,
    HeartbeatAck,
    Load,
    Member,
    Register,
    Registered,
    Slot,
)


@pytest.fixture
def state() -> FleetState:
    return FleetState("journal-1", RULES, ticked=0.0)


def saved(change: Change | Desired, *, required: bool = True) -> list[Effect]:
    return [Persist(Entry(change), required), Broadcast(change)]


def desire(state: FleetState, *slots: Slot, revision: int | None = None, now: float = 0.0) -> list[Effect]:
    """Wish and settle; what the caller and the watchers are told."""
    wish = Desired(state.desired.revision if revision is None else revision, slots)
    return settle(state, on_desire(state, wish, now), now)


A, B = Slot("a", "both"), Slot("b", "decode")


# What the fleet is to be -------------------------------------------------------------------------------------------


def test_a_wish_is_saved_told_and_answered(state: FleetState) -> None:
    assert on_desire(state, Desired(0, (A, B)), 0.0) == [
        *saved(Desired(1, (A, B))),
        Reply(200, Desired(1, (A, B))),
    ]
    assert state.desired == Desired(), "nothing changes before it is saved"
    desire(state, A, B)
    assert state.desired == Desired(1, (A, B))
    assert state.snapshot().desired == Desired(1, (A, B))
    assert state.changes_since(0) == (Desired(1, (A, B)),)


def test_a_wish_made_from_an_older_revision_is_refused(state: FleetState) -> None:
    desire(state, A)
    desire(state, A, B)
    assert refused(on_desire(state, Desired(1, (B,)), 0.0)) == (409, "stale")
    assert refused(on_desire(state, Desired(9, (B,)), 0.0)) == (409, "stale")
    assert state.desired == Desired(2, (A, B))


def test_the_same_wish_again_changes_nothing(state: FleetState) -> None:
    """Its answer was lost; the caller knows only the revision it began with."""
    desire(state, A)
    assert on_desire(state, Desired(0, (A,)), 0.0) == [Reply(200, Desired(1, (A,)))]


def test_nobody_is_wished_for_twice(state: FleetState) -> None:
    assert refused(on_desire(state, Desired(0, (A, Slot("a", "decode"))), 0.0)) == (400, "bad_request")


def test_an_empty_fleet_can_be_wished_for_once(state: FleetState) -> None:
    assert desire(state)[-1] == Reply(200, Desired(1))


def test_a_member_gets_its_new_role_at_once_and_keeps_it(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    turned = Member("a", "decode", "http://127.0.0.1:1", 7, "life-1", 1, "ready")
    assert on_desire(state, Desired(0, (Slot("a", "decode"),)), 0.0) == [
        *saved(Desired(2, (Slot("a", "decode"),))),
        *saved(Change(3, turned)),
        Reply(200, Desired(2, (Slot("a", "decode"),))),
    ]
    desire(state, Slot("a", "decode"))
    assert on_heartbeat(state, "a", Heartbeat(1, "ready"), 0.5) == [Reply(200, HeartbeatAck(3))]
    assert on_register(state, hello(state="ready"), 0.5) == [Reply(200, Registered(1, 3, 0.5, 10.0))]
    assert joined(state, hello(life="life-2")) == 2, "a later life, which still says 'both'"
    assert [one.role for one in state.members.values()] == ["decode"]
    desire(state, A)
    assert [one.role for one in state.members.values()] == ["both"]


def test_an_instance_that_is_to_leave_may_still_say_who_it_is(state: FleetState) -> None:
    desire(state, Slot("a", "decode"), B)
    joined(state, hello())
    desire(state, B)
    assert on_register(state, hello(), 0.5) == [Reply(200, Registered(1, state.revision, 0.5, 10.0))]
    assert state.members["a"].role == "decode"


def test_without_a_wish_another_role_is_another_instance(state: FleetState) -> None:
    joined(state, hello())
    other = Register("a", "decode", "http://127.0.0.1:1", 7, "life-1")
    assert refused(on_register(state, other, 0.5)) == (409, "incarnation_reused")


def test_the_role_of_vllms_own_connectors_stays(state: FleetState) -> None:
    upstream = Register("a", "prefill", "http://127.0.0.1:1", 7, "life-1", "ready", {UPSTREAM_CONNECTOR: "nixl"})
    joined(state, upstream)
    assert refused(on_desire(state, Desired(0, (Slot("a", "decode"),)), 0.0)) == (400, "role_fixed")
    assert desire(state, Slot("a", "prefill"))[-1] == Reply(200, Desired(2, (Slot("a", "prefill"),)))


def test_a_wish_that_cannot_be_saved_is_not_granted(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    effects = on_desire(state, Desired(0, (B,)), 0.0)
    done = settle(state, effects, 0.0, failed=True, new_controller="journal-2")
    assert done == [Announce(state.snapshot()), reactor.NOT_DURABLE]
    assert state.desired == Desired()
    assert on_desire(state, Desired(0, (B,)), 0.0) == [reactor.NOT_DURABLE]


def test_a_restart_remembers_the_wish(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    desire(state, A)
    desire(state, Slot("a", "decode", 3, True, "b"), B)
    for records in (journal.to_records(state), [*journal.to_records(FleetState("j", RULES)), *entries(state)]):
        loaded = journal.decode_records(journal.encode_records(records))
        assert loaded.dropped_bytes == 0
        again = journal.restore(loaded, RULES, "default", 50.0, "unused")
        assert (again.desired, again.members, again.revision) == (state.desired, state.members, state.revision)


def entries(state: FleetState) -> list[Entry]:
    return [Entry(change) for change in state.history]


# Leaving -----------------------------------------------------------------------------------------------------------


def test_draining_is_told_once_and_answered_with_how_busy_it_is(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    assert on_drain(state, "a", Drain(1), 0.1) == [
        *saved(Change(2, member(1, "draining")), required=False),
        Reply(200, Draining(2)),
    ]
    settle(state, on_drain(state, "a", Drain(1), 0.1), 0.1)
    beat = on_heartbeat(state, "a", Heartbeat(1, "ready", Load(3, 1)), 0.5)
    assert beat == [Reply(200, HeartbeatAck(2))], "its own heartbeat does not turn it back"
    assert on_drain(state, "a", Drain(1), 0.6) == [Reply(200, Draining(2, Load(3, 1)))]
    assert on_register(state, hello(state="ready"), 0.7) == [Reply(200, Registered(1, 2, 0.5, 10.0))]


def test_a_restart_of_the_controller_does_not_undrain(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    settle(state, on_drain(state, "a", Drain(1), 0.1), 0.1)
    again = journal.restore(journal.Loaded(tuple(journal.to_records(state))), RULES, "default", 50.0, "unused")
    assert on_heartbeat(again, "a", Heartbeat(1, "ready"), 50.1) == [Reply(200, HeartbeatAck(2))]
    assert again.members["a"].state == "draining"


def test_a_suspect_that_is_drained_comes_back_draining(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    list(listen(state, 2.0))
    settle(state, on_drain(state, "a", Drain(1), 2.0), 2.0)
    list(listen(state, 3.0))
    assert [one.state for one in state.members.values()] == ["suspect"]
    settle(state, on_heartbeat(state, "a", Heartbeat(1, "ready"), 3.1), 3.1)
    assert [one.state for one in state.members.values()] == ["draining"]


def test_only_the_life_that_was_meant_is_drained(state: FleetState) -> None:
    assert refused(on_drain(state, "a", Drain(1), 0.0)) == (404, "unknown")
    joined(state, hello())
    joined(state, hello(life="life-2"))
    assert refused(on_drain(state, "a", Drain(1), 0.0)) == (409, "fenced")
    assert refused(on_drain(state, "a", Drain(3), 0.0)) == (404, "unknown")


def test_a_new_life_is_not_draining(state: FleetState) -> None:
    joined(state, hello(state="ready"))
    settle(state, on_drain(state, "a", Drain(1), 0.1), 0.1)
    joined(state, hello(life="life-2", state="ready"))
    assert state.members["a"].state == "ready"
    assert state.pulses["a"].load is None
