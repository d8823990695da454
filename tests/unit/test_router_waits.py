"""Waits: one timer for all, and nobody else's cancellation is taken for one of them."""

from __future__ import annotations

import asyncio

import pytest

from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.router.waits import Ended, Wait, Waits


class Stubborn(Wait):
    """Waits on once."""

    asked = 0

    def due(self, now: float) -> bool:
        self.asked += 1
        return self.asked > 1


def waits() -> Waits:
    return Waits(RealEnv())


async def test_a_wait_that_is_over_ends_what_runs_inside() -> None:
    these = waits()
    with pytest.raises(Ended), Wait(these, 0.0):
        await asyncio.Event().wait()
    assert len(these) == 0
    await asyncio.sleep(0)  # not cancelled any more


async def test_a_wait_that_is_not_over_costs_nothing() -> None:
    these = waits()
    with Wait(these) as wait:
        await asyncio.sleep(0)
    assert (len(these), wait.fired) == (0, False)


async def test_who_wants_to_wait_on_does() -> None:
    these = waits()
    with pytest.raises(Ended), Stubborn(these, 0.0) as wait:  # noqa: PT012  what follows is what runs inside
        these.look()
        assert not wait.fired
        await asyncio.Event().wait()
    assert wait.asked == 2


async def test_somebody_elses_cancellation_stays_one() -> None:
    these, inside = waits(), asyncio.Event()

    async def work() -> None:
        with Wait(these):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_both_at_once_is_a_cancellation() -> None:
    these, inside = waits(), asyncio.Event()

    async def work() -> None:
        with Wait(these) as wait:
            inside.set()
            wait.at = 0.0
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    these.look()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_outer_wait_ends_the_outer_block() -> None:
    these = waits()
    with pytest.raises(Ended), Wait(these, 0.0):  # noqa: PT012  what follows is what runs inside
        try:
            with Wait(these):
                await asyncio.Event().wait()
        except Ended:
            pytest.fail("it was not the inner one")


async def test_both_waits_over_in_one_look_end_the_outer_block() -> None:
    these = waits()
    with pytest.raises(Ended), Wait(these, 0.0) as outer:  # noqa: PT012  what follows is what runs inside
        try:
            with Wait(these, 0.0):
                await asyncio.Event().wait()
        except Ended:
            pytest.fail("the outer one is over, too")
    assert outer.fired


async def test_an_error_inside_wins() -> None:
    these = waits()
    with pytest.raises(ValueError, match="mine"), Wait(these, 0.0) as wait:  # noqa: PT012  what follows is what runs inside
        try:
            await asyncio.Event().wait()
        finally:
            assert wait.fired
            raise ValueError("mine")


async def test_no_timer_runs_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_TURN_S", 0.001)
    these = waits()
    with Wait(these):
        pass
    await asyncio.sleep(0.01)
    assert these._timer is None
