"""What notices that a journal had come further, and what then keeps numbers from being given out twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vllm_fleet.controller import engine, reactor
from vllm_fleet.controller.effects import Reply
from vllm_fleet.controller.journal import NO_MARK, Mark
from vllm_fleet.controller.state import Entry, FleetState, Rules
from vllm_fleet.controller.stores.contract import StoreFailed
from vllm_fleet.controller.stores.embedded import EmbeddedStore
from vllm_fleet.controller.stores.memory import MemoryDisk, MemoryStore
from vllm_fleet.core.env import RealEnv
from vllm_fleet.wire.control import Change, Desired, Member, Register, Registered, Slot

RULES = Rules()


def member(name: str, generation: int, life: str = "") -> Member:
    url = f"http://127.0.0.1:{generation}"
    return Member(name, "both", url, 7, life or f"life-{generation}", generation, "ready")


def joined(revision: int, name: str, life: str = "") -> Entry:
    return Entry(Change(revision, member(name, revision, life)))


def started(store: EmbeddedStore | MemoryStore) -> FleetState:
    return engine.restore(store, RULES, "default", RealEnv())


def test_the_mark_follows_the_journal() -> None:
    mark = Mark("j", 3, 2)
    assert mark.after([]) == mark
    assert mark.after([joined(4, "a"), Entry(Desired(5))]) == Mark("j", 5, 4)
    store = MemoryStore()
    state = started(store)
    assert store.disk.mark == Mark(state.controller, 0, 0)
    store.append([joined(1, "a")])
    assert store.disk.mark == Mark(state.controller, 1, 1)


def test_an_older_copy_goes_on_under_another_name_with_new_numbers(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "state")
    before = started(store)
    store.append([joined(1, "a"), joined(2, "b")])
    shutil.copy(tmp_path / "state" / "journal", tmp_path / "copy")
    store.append([joined(3, "b"), joined(4, "c")])
    store.close()
    shutil.copy(tmp_path / "copy", tmp_path / "state" / "journal")
    store = EmbeddedStore(tmp_path / "state")
    state = started(store)
    assert state.controller != before.controller
    assert (state.revision, state.generation) == (4, 6)
    assert {name: found.generation for name, found in state.members.items()} == {"a": 5, "b": 6}
    assert not state.history
    known = (state.controller, state.revision, state.generation, state.members)
    store.close()
    store = EmbeddedStore(tmp_path / "state")
    again = started(store)
    assert (again.controller, again.revision, again.generation, again.members) == known, "that is on disk"
    store.close()


def test_numbers_go_on_when_the_journal_is_lost(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    before = started(store)
    store.append([joined(1, "a"), joined(2, "b")])
    store.close()
    (tmp_path / "journal").unlink()
    store = EmbeddedStore(tmp_path)
    state = started(store)
    store.close()
    assert (state.members, state.revision, state.generation) == ({}, 2, 2)
    assert state.controller != before.controller


@pytest.mark.parametrize("mark", [b"", b"\0" * 64, b"{}\n", b'{"journal":"j","revision":-1,"generation":0}\n'])
def test_a_mark_that_is_none_says_nothing(tmp_path: Path, mark: bytes) -> None:
    store = EmbeddedStore(tmp_path)
    before = started(store)
    store.append([joined(1, "a")])
    store.close()
    (tmp_path / "mark").write_bytes(mark)
    store = EmbeddedStore(tmp_path)
    state = started(store)
    store.close()
    assert (state.controller, state.generation) == (before.controller, 1)


def test_a_change_saved_just_before_a_crash_is_marked_at_the_next_start() -> None:
    store = MemoryStore()
    started(store)
    store.append([joined(1, "a")])
    store.disk.mark = NO_MARK.after(store.load().records[:1])  # the process died between the two
    started(MemoryStore(store.disk))
    store.disk.journal = b""
    assert started(MemoryStore(store.disk)).generation == 1


def test_an_older_copy_on_a_full_disk_is_no_start() -> None:
    """New generations would be told, and forgotten by the next start."""
    disk = MemoryDisk()
    store = MemoryStore(disk)
    started(store)
    store.append([joined(1, "a")])
    copy = disk.journal
    store.append([joined(2, "a")])
    disk.journal, disk.full = copy, True
    with pytest.raises(StoreFailed):
        started(MemoryStore(disk))


def test_a_life_from_before_the_forgotten_part_gets_no_older_generation() -> None:
    disk = MemoryDisk()
    store = MemoryStore(disk)
    started(store)
    store.append([joined(1, "a", "one")])
    copy = disk.journal
    store.append([Entry(Change(2, Member("a", "both", "http://127.0.0.1:1", 7, "one", 1, "gone")))])
    store.append([joined(3, "a", "one")])  # lapsed, and came back
    disk.journal = copy
    state = started(MemoryStore(disk))
    known = Register("a", "both", "http://127.0.0.1:1", 7, "one", "ready")
    reply = reactor.on_register(state, known, 1.0)[-1]
    assert isinstance(reply, Reply)
    assert isinstance(reply.body, Registered)
    assert reply.body.generation > 3


# Leases ---------------------------------------------------------------------------------------------------------------


def fleet(count: int) -> FleetState:
    state = FleetState("j", RULES)
    for number in range(1, count + 1):
        state.apply(joined(number, f"m{number}"), 0.0)
    return state


def ticked(state: FleetState, until: float, heard: str = "") -> None:
    now = state.ticked
    while now < until:
        now += RULES.tick_s
        if heard:
            state.heard(heard, "ready", now)
        reactor.settle(state, reactor.on_tick(state, now), now)


def test_while_nobody_at_all_is_heard_nobody_is_gone() -> None:
    state = fleet(3)
    ticked(state, 10 * RULES.lease_s)
    assert {found.state for found in state.members.values()} == {"suspect"}
    assert len(state.members) == 3


def test_once_somebody_is_heard_the_others_have_a_lease_left() -> None:
    state = fleet(3)
    ticked(state, 60.0)
    ticked(state, 60.0 + RULES.lease_s - 1.0, heard="m1")
    assert len(state.members) == 3
    ticked(state, 60.0 + RULES.lease_s + 1.0, heard="m1")
    assert set(state.members) == {"m1"}


def test_a_fleet_of_one_is_judged_all_the_same() -> None:
    state = fleet(1)
    ticked(state, RULES.lease_s + 1.0)
    assert not state.members


# Roles ----------------------------------------------------------------------------------------------------------------


def test_a_crash_between_a_wish_and_its_changes_leaves_roles_as_wished() -> None:
    store = MemoryStore()
    started(store)
    store.append([joined(1, "a"), joined(2, "b")])
    store.append([Entry(Desired(3, (Slot("a", "prefill"), Slot("b", "both"))))])  # ... and not the role of a
    state = started(MemoryStore(store.disk))
    assert {name: found.role for name, found in state.members.items()} == {"a": "prefill", "b": "both"}
    assert state.changes_since(3) is None, "who watched must be told of the role"
    again = started(MemoryStore(store.disk))
    assert (again.revision, again.members) == (state.revision, state.members)
