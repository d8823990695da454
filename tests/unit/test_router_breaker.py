"""Breakers, slow starts and the retry budget, by the clock that is passed in."""

from __future__ import annotations

import pytest

from tests.unit.test_router_view import member, names, view_of
from vllm_fleet.core import limits
from vllm_fleet.router.breaker import Breaker
from vllm_fleet.router.retries import RetryBudget
from vllm_fleet.wire.control import Change, Snapshot


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    assert breaker.failed(now, refused=True)
    return breaker


# The breaker -------------------------------------------------------------------------------------------------------


def test_a_refused_connection_opens_it_at_once_and_others_in_a_row() -> None:
    assert not opened().allows(0.9)
    breaker = Breaker()
    for _ in range(limits.BREAKER_IN_ROW - 1):
        assert not breaker.failed(0.0)
    assert breaker.allows(0.0)
    assert breaker.failed(0.0)
    assert not breaker.allows(0.0)


def test_an_answer_in_between_begins_the_row_anew() -> None:
    breaker = Breaker()
    for number in range(3 * limits.BREAKER_IN_ROW):
        breaker.failed(0.0) if number % 3 else breaker.succeeded(0.0)
        if number >= limits.BREAKER_TRIES_MIN - 2:
            break
    assert breaker.closed


def test_too_large_a_share_of_failures_opens_it() -> None:
    breaker = Breaker()
    found = [breaker.failed(0.0) if number % 2 else breaker.succeeded(0.0) for number in range(60)]
    assert found.index(True) == limits.BREAKER_TRIES_MIN - 1
    assert not breaker.allows(0.5)
    assert not breaker.succeeded(0.5), "asked before it opened"
    assert not breaker.allows(0.5)


def test_old_failures_are_forgotten() -> None:
    breaker = Breaker()
    for number in range(30):
        breaker.succeeded(number * limits.BREAKER_WINDOW_S)
        assert not breaker.failed(number * limits.BREAKER_WINDOW_S)


def test_half_open_lets_one_through_and_closes_with_its_answer() -> None:
    breaker = opened()
    assert breaker.allows(1.0)
    breaker.begin(1.0)
    assert not breaker.allows(1.1), "the probe is on its way"
    assert breaker.allows(1.0 + limits.BACKOFF_S), "it is late: another one"
    assert breaker.succeeded(1.2)
    assert (breaker.closed, breaker.allows(1.2)) == (True, True)


def test_a_probe_that_fails_keeps_it_open_for_twice_as_long() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(6):
        began = now
        while not breaker.allows(now):
            now += 0.125
        pauses.append(now - began)
        breaker.begin(now)
        assert breaker.failed(now + 0.01)
        now += 0.01
    assert pauses[1:] == pytest.approx([2.0, 4.0, 8.0, 10.0, 10.0], abs=0.13)


def test_one_death_counts_once() -> None:
    breaker = opened()
    assert not any(breaker.failed(0.1) for _ in range(100))
    assert breaker.allows(1.0)


def test_who_asks_to_be_left_alone_is() -> None:
    breaker = Breaker()
    breaker.leave_alone(3.0)
    assert (breaker.allows(2.9), breaker.allows(3.0)) == (False, True)
    assert breaker.succeeded(1.0), "it answers after all"


def test_a_share_grows() -> None:
    breaker = Breaker()
    assert breaker.share(0.0) == 1.0
    breaker.warm_up(0.0)
    assert breaker.share(0.0) == limits.SLOW_START_SHARE_MIN
    assert breaker.share(limits.SLOW_START_S / 2) == 0.5
    assert breaker.share(limits.SLOW_START_S) == 1.0
    assert breaker.share(0.0) == 1.0, "warm for good"


# In the view -------------------------------------------------------------------------------------------------------


def test_failures_take_an_instance_out_and_an_answer_brings_it_back() -> None:
    view = view_of(member("d", "decode"), member("e", "decode"))
    for _ in range(limits.BREAKER_IN_ROW):
        view.mark_failed(member("d", "decode"), 0.0)
    assert names(view.decodes(0.5)) == ["e"]
    assert (view.open_breakers(), names(view.left_alone(0.5))) == (frozenset({"d"}), ["d"])
    assert names(view.decodes(1.0)) == ["d", "e"]
    view.begin("d", 1.0)
    assert names(view.decodes(1.1)) == ["e"]
    view.mark_up("d", 1.2)
    assert names(view.decodes(1.2)) == ["d", "e"]
    assert view.open_breakers() == frozenset()


def test_who_comes_to_a_fleet_that_serves_gets_little_at_first() -> None:
    view = view_of(member("d", "decode"))
    view.apply(Change(11, member("e", "decode", "starting")), 0.0)
    view.apply(Change(12, member("e", "decode")), 50.0)
    both = view.decodes(50.0)

    def taking(now: float) -> int:
        return sum("e" in names(view.offered(both, now)) for _ in range(100))

    assert taking(50.0) == pytest.approx(100 * limits.SLOW_START_SHARE_MIN, abs=1)
    assert taking(50.0 + limits.SLOW_START_S / 2) == pytest.approx(50, abs=1)
    assert taking(50.0 + limits.SLOW_START_S) == 100
    assert names(view.offered([both[1]], 50.0)) == ["e"], "the only one"


def test_a_fleet_that_is_found_serving_starts_at_full_speed() -> None:
    view = view_of(member("d", "decode"), member("e", "decode"))
    assert [names(view.offered(view.decodes(0.0), 0.0)) for _ in range(3)] == [["d", "e"]] * 3
    view.apply(Snapshot("c", 20, (member("d", "decode"), member("e", "decode"))), 1.0)
    assert [names(view.offered(view.decodes(1.0), 1.0)) for _ in range(3)] == [["d", "e"]] * 3


def test_full_instances_are_not_offered_while_others_have_room() -> None:
    view = view_of(member("d", "decode"), member("e", "decode"))
    view.begin("d")
    assert names(view.offered(view.decodes(0.0), 0.0, requests_max=1)) == ["e"]
    view.begin("e")
    assert names(view.offered(view.decodes(0.0), 0.0, requests_max=1)) == ["d", "e"]


# The retry budget --------------------------------------------------------------------------------------------------


def test_retries_are_a_share_of_recent_requests() -> None:
    budget = RetryBudget(0.2)
    for _ in range(1000):
        budget.request(0.0)
    assert sum(budget.take(0.0) for _ in range(1000)) == 200
    later = limits.RETRY_WINDOW_S / 2
    assert not budget.take(later), "still within the window"
    assert sum(budget.take(3 * later) for _ in range(1000)) == limits.RETRIES_FREE


def test_a_few_retries_are_always_there() -> None:
    budget = RetryBudget(0.0)
    assert sum(budget.take(0.0) for _ in range(100)) == limits.RETRIES_FREE
