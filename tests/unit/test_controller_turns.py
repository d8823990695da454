"""Several turns with one write come to exactly what the same turns come to one by one."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_fleet.controller import journal, reactor
from vllm_fleet.controller.effects import Effect, Reply
from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.journal import Record
from vllm_fleet.controller.state import Entry, FleetState, Rules
from vllm_fleet.controller.stores.contract import StoreFailed
from vllm_fleet.controller.stores.embedded import EmbeddedStore
from vllm_fleet.controller.stores.memory import MemoryDisk, MemoryStore
from vllm_fleet.controller.turns import Decide, Together, become, decide_together
from vllm_fleet.core.env import RealEnv
from vllm_fleet.wire.control import Heartbeat, Register, Registered, ReportedState

STATES: tuple[ReportedState, ...] = ("starting", "ready", "draining")


def register(number: int, life: int = 1, state: ReportedState = "starting") -> Decide:
    request = Register(f"i-{number}", "both", f"http://h:{number + 1}", 1, f"life-{life}", state)
    return lambda fleet, now: reactor.on_register(fleet, request, now)


def beat(number: int, generation: int, state: ReportedState = "ready") -> Decide:
    return lambda fleet, now: reactor.on_heartbeat(fleet, f"i-{number}", Heartbeat(generation, state), now)


def leave(number: int, generation: int) -> Decide:
    return lambda fleet, now: reactor.on_deregister(fleet, f"i-{number}", generation, now)


def some(rng: random.Random) -> list[Decide]:
    """Decisions that follow on, contradict and repeat one another."""
    made: list[Decide] = []
    for _ in range(rng.randrange(1, 12)):
        number, number_2 = rng.randrange(4), rng.randrange(1, 9)
        kind = rng.choice(["register", "register", "beat", "beat", "leave", "tick"])
        if kind == "register":
            made.append(register(number, number_2 % 3, rng.choice(STATES)))
        elif kind == "beat":
            made.append(beat(number, number_2, rng.choice(STATES)))
        elif kind == "leave":
            made.append(leave(number, number_2))
        else:
            made.append(reactor.on_tick)
    return made


def one_by_one(state: FleetState, decisions: Sequence[Decide], now: float) -> tuple[list[Entry], list[list[Effect]]]:
    entries: list[Entry] = []
    shown = []
    for decide in decisions:
        effects = decide(state, now)
        entries += reactor.to_save(state, effects)
        shown.append(reactor.settle(state, effects, now))
    return entries, shown


@pytest.mark.parametrize("seed", range(40))
def test_together_is_as_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    batched, single = FleetState("j", Rules()), FleetState("j", Rules())
    now = 100.0
    for _ in range(20):
        now += rng.choice([0.01, 0.3, 2.0, 12.0])
        decisions = some(rng)
        before = copy.deepcopy(batched)
        made = decide_together(batched, decisions, now)
        assert batched == before, "the state changed before anything was saved"
        become(batched, made.draft)
        assert (made.entries, made.shown) == one_by_one(single, decisions, now)
        assert batched == single


class CountingStore(MemoryStore):
    """Counts its writes; the next ``failures`` fail."""

    def __init__(self) -> None:
        super().__init__(MemoryDisk())
        self.appends: list[int] = []
        self.failures = 0
        self.writing, self.disk_is_ready = threading.Event(), threading.Event()
        self.disk_is_ready.set()

    def append(self, entries: Sequence[Entry]) -> None:
        self.appends.append(len(entries))
        self.writing.set()
        assert self.disk_is_ready.wait(5.0)
        if self.failures:
            self.failures -= 1
            raise StoreFailed("the disk is full")
        super().append(entries)

    def rewrite(self, records: Sequence[Record]) -> None:
        if self.failures:
            raise StoreFailed("the disk is full")
        super().rewrite(records)


async def submitted(engine: Engine, decisions: Sequence[Decide]) -> list[Reply | BaseException]:
    """All decisions wait before the engine takes the first."""
    asking = [asyncio.create_task(engine.submit(decide)) for decide in decisions]
    await asyncio.sleep(0)
    running = asyncio.create_task(engine.run())
    replies = await asyncio.gather(*asking, return_exceptions=True)
    await engine.stop()
    await running
    return replies


def new_engine(store: MemoryStore) -> Engine:
    state = FleetState("j", Rules())
    store.rewrite(journal.to_records(state))
    return Engine(state, store, RealEnv())


async def test_many_are_saved_with_one_write() -> None:
    store = CountingStore()
    engine = new_engine(store)
    replies = await submitted(engine, [register(number) for number in range(100)])
    given = [
        reply.body.generation for reply in replies if isinstance(reply, Reply) and isinstance(reply.body, Registered)
    ]
    assert given == list(range(1, 101))
    assert store.appends == [100]
    restored = journal.restore(store.load(), Rules(), "default", 0.0, "new")
    assert restored.members == engine.state.members


async def test_when_that_write_fails_nobody_joins_and_nothing_is_kept() -> None:
    store = CountingStore()
    engine = new_engine(store)
    store.failures = 1
    replies = await submitted(engine, [register(number) for number in range(10)])
    assert [reply.status for reply in replies if isinstance(reply, Reply)] == [503] * 10
    assert (engine.state.members, engine.state.durable, store.appends) == ({}, False, [10])
    assert engine.state.controller != "j", "what follows is another history"


async def test_a_bad_turn_spoils_only_itself() -> None:
    def bad(state: FleetState, now: float) -> list[Effect]:
        raise ZeroDivisionError

    store = CountingStore()
    first, second, third = await submitted(new_engine(store), [register(0), bad, register(1)])
    assert isinstance(first, Reply)
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(third, Reply)
    assert (first.status, third.status, store.appends) == (200, 200, [1, 1])


async def test_what_changes_nothing_is_answered_at_once_unless_a_turn_waits_for_the_disk() -> None:
    store = CountingStore()
    engine = new_engine(store)
    await submitted(engine, [register(number, state="ready") for number in (0, 1)])
    reply = engine.attempt(beat(0, 1))
    assert reply is not None
    assert reply.status == 200
    assert engine.attempt(beat(1, 2, "draining")) is None, "a change has its turn"
    assert engine.state.members["i-1"].state == "ready"
    waiting = asyncio.create_task(engine.submit(leave(0, 1)))
    await asyncio.sleep(0)
    assert engine.attempt(beat(0, 1)) is not None, "the other turn has not begun"
    store.disk_is_ready.clear()
    store.writing.clear()
    running = asyncio.create_task(engine.run())
    await asyncio.to_thread(store.writing.wait, 5.0)
    assert engine.attempt(beat(0, 1)) is None, "it may have left already"
    store.disk_is_ready.set()
    assert (await waiting).status == 204
    gone = engine.attempt(beat(0, 1))
    assert gone is not None
    assert gone.status == 404
    await engine.stop()
    await running


def test_a_thousand_entries_are_one_append(tmp_path: Path) -> None:
    state = FleetState("j", Rules())
    made = decide_together(state, [register(number) for number in range(1000)], 1.0)
    store = EmbeddedStore(tmp_path)
    store.load()
    store.rewrite(journal.to_records(state))
    store.append(made.entries)
    store.close()
    again = EmbeddedStore(tmp_path)
    restored = journal.restore(again.load(), Rules(), "default", 0.0, "new")
    again.close()
    assert restored.members == made.draft.members


async def test_turns_that_save_nothing_share_no_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CountingStore()
    engine = new_engine(store)
    await submitted(engine, [register(0, state="ready")])
    drafts: list[int] = []

    def counted(state: FleetState, decisions: Sequence[Decide], now: float) -> Together:
        drafts.append(len(decisions))
        return decide_together(state, decisions, now)

    monkeypatch.setattr("vllm_fleet.controller.engine.decide_together", counted)
    await submitted(engine, [beat(0, 1)] * 50)
    assert drafts == []
    await submitted(engine, [beat(0, 1), register(1), beat(0, 1), register(2)])
    assert (drafts, store.appends) == ([3], [1, 2])
