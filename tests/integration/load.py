"""A load that never stops and checks each answer, and what else tests of fleets that change under it share."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import aiohttp
import psutil

from tests.conftest import MODEL, RunningFleet
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.bench.storm_client import Ended, Order, alone, ask
from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.control import Member, Snapshot

CONCURRENCY = 16
PAUSE_S = (6.0, 16.0)
DEADLINE_S = 120.0
seeds = itertools.count(int(os.urandom(4).hex(), 16))


class Load:
    """16 clients that never stop asking; each answer is checked. They pause between requests: an instance that starts
    needs some of the two cores that CI has."""

    def __init__(self, fleet: RunningFleet, pause_s: tuple[float, float] = PAUSE_S) -> None:
        self._fleet, self._pause_s = fleet, pause_s
        self.ended: list[Ended] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        self.more(4)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def more(self, count: int) -> None:
        """Wait until so many further requests have ended: the load is on."""
        wanted, until = len(self.ended) + count, time.monotonic() + DEADLINE_S
        while len(self.ended) < wanted:
            assert time.monotonic() < until, "the load does not get on"
            time.sleep(0.05)

    def check(self) -> Counter[str]:
        """All were answered, and rightly; where each was decoded."""
        assert len(self.ended) >= CONCURRENCY
        bad = [one for one in self.ended if one.outcome != "right"]
        # The model itself errs at times: then an instance that is asked alone says the same.
        urls = [one["url"] for one in self._fleet.status()["instances"] if one["state"] == "ready"]
        for one in [one for one in bad if one.outcome == "wrong" and one.order is not None]:
            assert one.order is not None
            if alone(urls[0], MODEL.name, one.order, f"lifecycle-{one.name}") == one.detail:
                bad.remove(one)
        assert bad == []
        return Counter(one.decode or "" for one in self.ended)

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S + 10)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(CONCURRENCY)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        for turn in itertools.count():
            if self._stop.is_set():
                return
            rng = random.Random(next(seeds))
            stream = rng.random() < 0.7
            tokens = rng.choice((3, 12, 60)) if stream else 3
            order = Order(make_prompt(rng, rng.choice((2, 20, 60, 120))), stream, tokens)
            name = f"c{number}-{turn}"
            self.ended.append(await ask(session, self._fleet.router, MODEL.name, order, name, DEADLINE_S))
            await asyncio.sleep(rng.uniform(*self._pause_s))


def deadline() -> Deadline:
    return Deadline.after(5.0, "test")


def client(fleet: RunningFleet) -> ControlClient:
    return ControlClient(fleet.controller, bearer(read_token(fleet.home / "default" / "token")))


def snapshot(fleet: RunningFleet) -> Snapshot:
    return client(fleet).snapshot(deadline())


def controllers(fleet: RunningFleet) -> list[psutil.Process]:
    """Their processes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "vllm_fleet.controller" in words and any(str(fleet.home) in word for word in words):
            found.append(process)
    return found


def lives(snapshot: Snapshot) -> dict[str, tuple[int, str, str]]:
    """Who is there, in which life, as what."""
    return {member.name: (member.generation, member.incarnation, member.role) for member in snapshot.members}


def members(fleet: RunningFleet) -> dict[str, Member]:
    return {member.name: member for member in snapshot(fleet).members}


def wait_for(what: str, check: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.1)
