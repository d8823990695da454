"""Who leads, by a clock and an etcd that tests play: no sockets, no processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from vllm_fleet.controller import engine, reactor
from vllm_fleet.controller.leader import CAUTION, Following, Leadership, Term
from vllm_fleet.controller.state import Rules
from vllm_fleet.controller.stores.memory import MemoryDisk, MemoryStore
from vllm_fleet.controller.turns import Decide
from vllm_fleet.core import limits
from vllm_fleet.core.errors import Busy, NotLeader
from vllm_fleet.wire.control import Heartbeat, Register, Registered

TERM = Term(b"leader", 7, 1, 3.0)


class Clock:
    """A process's clock, moved by hand."""

    def __init__(self) -> None:
        self.rng = random.Random(1)
        self.at = 100.0

    def now(self) -> float:
        return self.at

    def wall(self) -> float:
        return 0.0

    def new_id(self) -> str:
        return f"{self.rng.getrandbits(128):032x}"


class Etcd:
    """An election whose answers are a list; an exception is raised. Each answer takes ``slow_s``."""

    def __init__(self, clock: Clock, *answers: Term | Following | float | Exception | None) -> None:
        self.answers, self.slow_s = list(answers), 0.0
        self.waited: list[Following] = []
        self.resigned: list[Term] = []
        self.asked = asyncio.Semaphore(0)
        self._clock, self._loop = clock, asyncio.get_running_loop()

    def campaign(self) -> Term | Following:
        answer = self._next()
        assert isinstance(answer, Term | Following)
        return answer

    def renew(self, term: Term) -> float | None:
        answer = self._next()
        assert answer is None or isinstance(answer, float)
        return answer

    def wait(self, seen: Following) -> None:
        self.waited.append(seen)

    def resign(self, term: Term) -> None:
        self.resigned.append(term)

    def _next(self) -> Term | Following | float | None:
        self._clock.at += self.slow_s
        answer = self.answers.pop(0)
        self._loop.call_soon_threadsafe(self.asked.release)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ETCD_RETRY_S", 0.0)
    monkeypatch.setattr("vllm_fleet.controller.leader.RENEWALS", 1e6)


async def test_stands_by_until_the_key_is_free_and_knows_who_leads() -> None:
    clock = Clock()
    other = Following("http://127.0.0.1:2", 5)
    etcd = Etcd(clock, Busy("down"), other, other, TERM)
    leadership = Leadership(etcd, clock)
    assert not leadership.holds()
    assert await leadership.gain() == TERM
    assert etcd.waited == [other, other]
    assert (leadership.holds(), leadership.reachable, leadership.leader) == (True, True, "")


async def test_whoever_does_not_lead_names_the_one_that_does() -> None:
    clock = Clock()
    etcd = Etcd(clock, Following("http://127.0.0.1:2", 5), Busy("down"), TERM)
    leadership = Leadership(etcd, clock)
    assert leadership.refusal().leader == ""
    gaining = asyncio.create_task(leadership.gain())
    await etcd.asked.acquire()
    assert leadership.refusal().leader in ("", "http://127.0.0.1:2")
    await gaining


async def test_a_lease_is_counted_from_before_it_was_asked_for_and_ends_early() -> None:
    clock = Clock()
    etcd = Etcd(clock, TERM)
    etcd.slow_s = 1.0
    leadership = Leadership(etcd, clock)
    await leadership.gain()
    assert clock.at == 101.0
    clock.at = 100.0 + CAUTION * 3.0 - 0.01
    assert leadership.holds()
    clock.at = 100.0 + CAUTION * 3.0
    assert not leadership.holds()
    assert "etcd must say" in str(leadership.refusal())


@asynccontextmanager
async def keeping(leadership: Leadership) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(leadership.keep(await leadership.gain()))
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_while_etcd_is_away_a_term_pauses_and_it_goes_on_when_nobody_took_over() -> None:
    clock = Clock()
    etcd = Etcd(clock, TERM, *[Busy("down")] * 3, 3.0, None)
    leadership = Leadership(etcd, clock)
    clock.at = 100.0
    async with keeping(leadership) as task:
        for _ in range(2):
            await etcd.asked.acquire()
        clock.at = 110.0
        assert not leadership.holds()
        await task
    assert etcd.answers == []
    assert leadership.leader == ""
    assert not leadership.holds()


async def test_a_term_that_etcd_calls_over_is_over_at_once() -> None:
    clock = Clock()
    leadership = Leadership(Etcd(clock, TERM, None), clock)
    async with keeping(leadership) as task:
        await task
        assert not leadership.holds()
        assert "who does is not known" in str(leadership.refusal())


async def test_who_resigns_answers_nothing_more() -> None:
    clock = Clock()
    etcd = Etcd(clock, TERM)
    leadership = Leadership(etcd, clock)
    await leadership.resign(await leadership.gain())
    assert not leadership.holds()
    assert etcd.resigned == [TERM]


# The engine under a leadership -------------------------------------------------------------------------------------


class Lead:
    def __init__(self) -> None:
        self.held = True

    def holds(self) -> bool:
        return self.held

    def refusal(self) -> NotLeader:
        return NotLeader("another one leads", "http://127.0.0.1:2")


@asynccontextmanager
async def running(store: MemoryStore, lead: Lead, clock: Clock) -> AsyncIterator[engine.Engine]:
    made = engine.Engine(engine.restore(store, Rules(), "default", clock), store, clock, lead)
    task = asyncio.create_task(made.run())
    yield made
    await made.stop()
    await task


def joining(life: str) -> Decide:
    request = Register("a", "both", "http://127.0.0.1:1", 1, life, "ready")
    return lambda state, now: reactor.on_register(state, request, now)


def beating(generation: int) -> Decide:
    return lambda state, now: reactor.on_heartbeat(state, "a", Heartbeat(generation, "ready"), now)


async def test_an_engine_that_does_not_lead_decides_and_answers_nothing() -> None:
    lead, clock, store = Lead(), Clock(), MemoryStore()
    async with running(store, lead, clock) as made:
        assert isinstance((await made.submit(joining("life"))).body, Registered)
        before, journal = made.state.snapshot(), store.disk.journal
        lead.held = False
        for call in (joining("other"), beating(1)):
            with pytest.raises(NotLeader) as refused:
                await made.submit(call)
            assert refused.value.leader == "http://127.0.0.1:2"
        with pytest.raises(NotLeader):
            made.attempt(beating(1))
        assert not made.durable
        assert (made.state.snapshot(), store.disk.journal) == (before, journal)
        lead.held = True
        assert (await made.submit(beating(1))).status == 200
        assert not made.lost.is_set()


async def test_what_was_saved_is_not_told_by_one_that_stopped_leading_meanwhile() -> None:
    lead, clock = Lead(), Clock()

    class Slow(MemoryStore):
        def append(self, entries: object) -> None:
            super().append(entries)  # type: ignore[arg-type]
            lead.held = False

    async with running(Slow(), lead, clock) as made:
        with pytest.raises(NotLeader):
            await made.submit(joining("life"))


async def test_a_refused_write_ends_the_engine_for_good_and_changes_nothing() -> None:
    lead, clock, disk = Lead(), Clock(), MemoryDisk()
    async with running(MemoryStore(disk), lead, clock) as made:
        await made.submit(joining("life"))
        before = made.state.snapshot()
        MemoryStore(disk)  # somebody else owns it from here on
        calls = [made.submit(joining("second")), made.submit(joining("third"))]
        refused = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in refused] == [NotLeader, NotLeader]
        assert made.lost.is_set()
        assert made.state.snapshot() == before
        with pytest.raises(NotLeader):
            made.attempt(beating(1))
