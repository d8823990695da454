"""Who waits, whose turn it is, who is turned away."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.mock_instance import MockInstance, fleet, pair, until
from vllm_fleet.core import limits
from vllm_fleet.router.admission import Admission
from vllm_fleet.router.fair import FairQueue
from vllm_fleet.router.request_rules import RequestRules


def drained(queue: FairQueue[str]) -> list[str]:
    found = []
    while (item := queue.pop()) is not None:
        found.append(item)
    return found


# The queue ---------------------------------------------------------------------------------------------------------


def test_callers_take_turns_and_each_keeps_its_order() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        assert queue.put(item[0], item) is None
    assert drained(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert len(queue) == 0


def test_a_heavier_key_gets_more() -> None:
    queue: FairQueue[str] = FairQueue(100, {"a": 3})
    for number in range(12):
        for key in ("a", "b"):
            queue.put(key, f"{key}{number}")
    first = Counter(item[0] for item in drained(queue)[:16])
    assert first == {"a": 12, "b": 4}


def test_whoever_floods_gives_way_to_others_and_to_nobody_else() -> None:
    queue: FairQueue[str] = FairQueue(3)
    for item in ("a1", "a2", "a3"):
        assert queue.put("a", item) is None
    assert queue.put("a", "a4") == "a4"
    assert queue.put("b", "b1") == "a3"
    assert queue.put("b", "b2") == "b2", "it would only swap places"
    assert drained(queue) == ["a1", "b1", "a2"]


def test_who_gives_up_is_not_called() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for item in ("a1", "b1", "c1"):
        queue.put(item[0], item)
    assert queue.remove("b1")
    assert not queue.remove("b1")
    assert drained(queue) == ["a1", "c1"]


def test_a_queue_of_nothing_takes_nobody() -> None:
    assert FairQueue[str](0).put("a", "a1") == "a1"


@given(st.lists(st.one_of(st.tuples(st.sampled_from("abc"), st.integers(0, 99)), st.none()), max_size=60))
def test_nobody_is_lost_or_called_twice(steps: list[tuple[str, int] | None]) -> None:
    queue: FairQueue[str] = FairQueue(5, {"b": 2})
    waiting: set[str] = set()
    for number, step in enumerate(steps):
        if step is None:
            item = queue.pop()
            assert (item is None) == (not waiting)
            waiting.discard(item or "")
            continue
        key, choice = step
        if choice < 20 and waiting:
            gone = sorted(waiting)[choice % len(waiting)]
            assert queue.remove(gone)
            waiting.discard(gone)
            continue
        waiting.add(f"{key}{number}")
        waiting.discard(queue.put(key, f"{key}{number}") or "")
        assert len(queue) == len(waiting) <= 5
    assert sorted(drained(queue)) == sorted(waiting)


# Admission ---------------------------------------------------------------------------------------------------------


def test_places_are_given_and_taken() -> None:
    admission: Admission[str] = Admission(lambda now: 2, 5)
    assert [admission.enter(0.0) for _ in range(3)] == [True, True, False]
    assert admission.wait("a", "x") is None
    assert admission.next(0.0) is None
    admission.leave(0.0)
    assert not admission.enter(0.0), "others wait already"
    assert admission.next(0.0) == "x"
    assert (admission.running, admission.waiting) == (2, 0)


def test_whoever_is_turned_away_is_told_when_to_come_again() -> None:
    admission: Admission[str] = Admission(lambda now: 1, 50)
    admission.enter(0.0)
    assert admission.retry_after_s(0.0) == limits.RETRY_AFTER_S
    for number in range(20):
        admission.wait("a", f"{number}")
    for second in range(1, 6):
        admission.leave(float(second))
        admission.next(float(second))
    assert 10 <= admission.retry_after_s(5.0) <= 20


# Over sockets ------------------------------------------------------------------------------------------------------


async def test_one_more_than_the_queue_holds_is_refused() -> None:
    p, d = pair()
    d.gate = p.gate = asyncio.Event()
    rules = RequestRules(in_flight_max=1, queue_max=1)
    async with fleet(p, d, rules=rules) as up, asyncio.TaskGroup() as group:
        first = group.create_task(up.post({"prompt": "1"}))
        await until(lambda: up.router.exchange.live == 1)
        second = group.create_task(up.post({"prompt": "2"}))
        await until(lambda: up.router.exchange.live == 2)
        assert up.metric("vllm_fleet_router_waiting") == 1
        status, body, headers = await up.post({"prompt": "3"})
        assert (status, body["error"]["code"], body["error"]["type"]) == (429, "too_many_requests", "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        assert headers["x-fleet-handoff"] == "turned_away"
        d.gate.set()
        assert [(await one)[0] for one in (first, second)] == [200, 200]
        assert up.metric("vllm_fleet_router_turned_away_total") == 1
    assert (up.router.exchange.running, up.router.exchange.live) == (0, 0)


async def test_another_key_is_not_turned_away_by_one_that_floods() -> None:
    p, d = pair()
    d.gate = p.gate = asyncio.Event()
    rules = RequestRules(in_flight_max=1, queue_max=2)
    async with fleet(p, d, rules=rules) as up, asyncio.TaskGroup() as group:
        flood = []
        for number in range(3):
            flood.append(group.create_task(up.post({"prompt": str(number)}, authorization="Bearer a")))
            await until(partial(lambda number: up.router.exchange.live == number + 1, number))
        other = group.create_task(up.post({"prompt": "x"}, authorization="Bearer b"))
        assert (await flood[2])[0] == 429
        d.gate.set()
        assert [(await one)[0] for one in (*flood[:2], other)] == [200, 200, 200]


async def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    p, d = pair()
    d.gate = p.gate = asyncio.Event()
    async with fleet(p, d, rules=RequestRules(in_flight_max=1)) as up, asyncio.TaskGroup() as group:
        first = group.create_task(up.post({"prompt": "1"}))
        await until(lambda: up.router.exchange.live == 1)
        leaving = asyncio.create_task(up.post({"prompt": "2"}))
        await until(lambda: up.router.exchange.live == 2)
        leaving.cancel()
        await until(lambda: up.router.exchange.live == 1)
        assert up.metric("vllm_fleet_router_waiting") == 0
        d.gate.set()
        assert (await first)[0] == 200
        assert (await up.post({"prompt": "3"}))[0] == 200


async def test_waiting_has_an_end() -> None:
    d = MockInstance("d", "decode", gate=asyncio.Event())
    rules = RequestRules(in_flight_max=1, queue_s=0.05)
    async with fleet(d, rules=rules) as up, asyncio.TaskGroup() as group:
        first = group.create_task(up.post({"prompt": "1"}))
        await until(lambda: up.router.exchange.live == 1)
        assert (await up.post({"prompt": "2"}))[0] == 429
        assert d.gate is not None
        d.gate.set()
        assert (await first)[0] == 200


@pytest.mark.parametrize("limit", [1, 2])
async def test_an_instance_gets_no_more_than_it_may_have(limit: int) -> None:
    d, e = MockInstance("d", "decode", gate=asyncio.Event()), MockInstance("e", "decode", gate=asyncio.Event())
    async with fleet(d, e, rules=RequestRules(instance_requests_max=limit)) as up, asyncio.TaskGroup() as group:
        asked = [group.create_task(up.post({"prompt": str(number)})) for number in range(2 * limit + 2)]
        await until(lambda: up.metric("vllm_fleet_router_waiting") == 2)
        await until(lambda: d.running == e.running == limit)
        for one in (d, e):
            assert one.gate is not None
            one.gate.set()
        assert {(await one)[0] for one in asked} == {200}
