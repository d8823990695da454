"""launcher.link against a real controller, and an instance and a router that are pages."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.unit.test_controller_client import answering
from tests.unit.test_controller_server import Running, Start, soon, start
from vllm_fleet.launcher.events import Declared, DrainAnswer, Event, Watched
from vllm_fleet.launcher.link import Link
from vllm_fleet.net import sockets
from vllm_fleet.wire.control import Desired, Heartbeat, Load, Register, Slot

__all__ = ["start"]
Told = TypeVar("Told", Declared, DrainAnswer, Watched)
SLOTS = (Slot("a", "prefill"), Slot("b", "decode"))
ENGINE = b"""# HELP x
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
"""
ROUTER = b"""vllm_fleet_router_in_flight{instance="a"} 5.0
vllm_fleet_router_in_flight{instance="ab"} 7.0
"""


class Ears:
    """A Link, and what it tells."""

    def __init__(self, token_file: Path) -> None:
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.link = Link(token_file, self._told.put)

    async def next(self, kind: type[Told]) -> Told:
        """The next event of this kind; others before it are forgotten."""
        while True:
            told = await asyncio.to_thread(self._told.get, True, 10.0)
            if isinstance(told, kind):
                return told


@pytest.fixture
async def controller(start: Start) -> Running:
    return await start()


@pytest.fixture
async def ears(controller: Running, tmp_path: Path) -> AsyncIterator[Ears]:
    made = Ears(tmp_path / "token")
    made.link.start([controller.url])
    yield made
    await asyncio.to_thread(made.link.close)


def page(body: bytes) -> object:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)
        await writer.drain()

    return serve


async def test_the_first_declaration_counts_and_later_ones_only_where_nobody_spoke(
    controller: Running, ears: Ears
) -> None:
    await asyncio.to_thread(controller.client.desire, Desired(0, (Slot("old", "both"),)), soon())
    ears.link.declare(SLOTS)
    made = (await ears.next(Declared)).desired
    assert made is not None
    assert made.instances == SLOTS, "whatever an earlier fleet of this name was to be"
    other = await asyncio.to_thread(controller.client.desire, Desired(made.revision, SLOTS[:1]), soon())
    ears.link.declare(SLOTS)
    assert await ears.next(Declared) == Declared(other)


async def test_what_changes_is_told(controller: Running, ears: Ears) -> None:
    assert (await ears.next(Watched)).members == {}
    await controller.join(Register("a", "prefill", "http://127.0.0.1:1", 1, "life-1"))
    assert (await ears.next(Watched)).members["a"].state == "starting"
    await controller.beat(1)
    assert (await ears.next(Watched)).members["a"].state == "ready"
    await asyncio.to_thread(controller.client.deregister, "a", 1, soon())
    assert (await ears.next(Watched)).members == {}
    wish = await asyncio.to_thread(controller.client.desire, Desired(0, SLOTS), soon())
    assert (await ears.next(Watched)).desired == wish


async def test_a_dead_instance_leaves_at_once_and_no_other_life_does(controller: Running, ears: Ears) -> None:
    await controller.join(Register("a", "prefill", "http://127.0.0.1:1", 7, "life-1", "ready"))
    while "a" not in (await ears.next(Watched)).members:
        pass
    ears.link.ended("a", 6)
    ears.link.ended("b", 7)
    ears.link.ended("a", 7)
    assert (await ears.next(Watched)).members == {}
    await controller.join(Register("a", "prefill", "http://127.0.0.1:1", 8, "life-2", "ready"))
    assert (await ears.next(Watched)).members["a"].generation == 2
    ears.link.ended("a", 7)
    ears.link.ask_drain("a", 2, "http://127.0.0.1:1", None)
    assert (await ears.next(DrainAnswer)).told
    assert (await asyncio.to_thread(controller.client.snapshot, soon())).members[0].state == "draining"


async def test_draining_says_how_busy_engine_and_router_are(controller: Running, ears: Ears) -> None:
    await controller.join(Register("a", "prefill", "http://127.0.0.1:1", 1, "life-1", "ready"))
    beat = Heartbeat(1, "ready", Load(3, 1))
    await asyncio.to_thread(controller.client.heartbeat, "a", beat, soon())
    ears.link.ask_drain("a", 1, "http://127.0.0.1:1", None)
    assert await ears.next(DrainAnswer) == DrainAnswer("a", told=True, load=Load(3, 1))
    async with answering(page(ROUTER)) as router:  # type: ignore[arg-type]
        ears.link.ask_drain("a", 1, "http://127.0.0.1:1", router)
        assert await ears.next(DrainAnswer) == DrainAnswer("a", told=True, load=Load(5, 1))


async def test_an_instance_whose_heartbeats_say_nothing_is_asked_itself(controller: Running, ears: Ears) -> None:
    await controller.join(Register("a", "prefill", "http://127.0.0.1:1", 1, "life-1", "ready"))
    async with answering(page(ENGINE)) as instance:  # type: ignore[arg-type]
        ears.link.ask_drain("a", 1, instance, None)
        assert await ears.next(DrainAnswer) == DrainAnswer("a", told=True, load=Load(7, None))
        ears.link.ask_drain("a", 9, instance, None)
        assert (await ears.next(DrainAnswer)).told, "nobody is sent to a life that is not known"
        ears.link.ask_drain("a", None, instance, None)
        assert (await ears.next(DrainAnswer)).told
    ears.link.ask_drain("a", 1, "http://127.0.0.1:1", None)
    assert await ears.next(DrainAnswer) == DrainAnswer("a", told=True, load=None)


async def test_a_controller_that_is_away_was_told_nothing(controller: Running, tmp_path: Path) -> None:
    ears = Ears(tmp_path / "token")
    ears.link.start([f"http://127.0.0.1:{sockets.free_port('127.0.0.1')}"])
    ears.link.declare(SLOTS)
    assert await ears.next(Declared) == Declared(None)
    ears.link.ask_drain("a", 1, "http://127.0.0.1:1", None)
    assert await ears.next(DrainAnswer) == DrainAnswer("a", told=False, load=None)
    await asyncio.to_thread(ears.link.close)
    ears.link.declare(SLOTS)  # nobody listens any more
