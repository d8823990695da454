"""The storm: many requests with known answers at a fleet whose instances are killed, stopped and started meanwhile.

Every request ends in time, with the right answer or with an error that is excused (``excuse``); afterwards the fleet
holds nothing that it did not hold before. A fault that did not happen makes the run invalid, and so fails it.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import aiohttp

from vllm_fleet.bench import gauges
from vllm_fleet.bench.gauges import Gauges
from vllm_fleet.bench.own_fleet import OwnFleet, Proof
from vllm_fleet.bench.storm_client import Ended, Order, alone, ask, draw
from vllm_fleet.core.errors import FleetError

QUIET_REQUESTS = 32
SLACK = 12
"""File descriptors or threads by which an instance may differ between two quiet rounds: connections come and go."""
_EXCUSE_S = 0.5  # between a fault and the moment at which it is proved


@dataclass(frozen=True)
class Fault:
    """Kill an instance and start it again, or stop it for a while; ``pause_s`` after the fault before it."""

    kind: Literal["kill", "stop"]
    victim: str
    pause_s: float = 3.0
    stop_s: float = 5.0


@dataclass(frozen=True)
class Storm:
    """What is asked, and what is broken meanwhile. It lasts until both are done."""

    requests: int
    lanes: tuple[tuple[Fault, ...], ...]
    """Faults of one lane happen one after the other, those of different lanes at the same time."""
    concurrency: int = 16
    leave_share: float = 0.2
    per_s: float = 6.0
    """Requests a second, in bursts of ``concurrency``: an instance that starts again needs some of the cores."""
    deadline_s: float = 60.0
    """router.request_timeout_s of the fleet."""
    seed: int = 0
    recomputes: bool = False
    """The fleet makes transfers fail (``fabric.faults``): unless some were recomputed the run is invalid."""


@dataclass(frozen=True)
class Away:
    """An instance could not serve."""

    victim: str
    kind: str
    from_s: float
    until_s: float


@dataclass
class Report:
    """All that a storm found. Seconds are since its start."""

    seconds: float = 0.0
    requests: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    handoffs: dict[str, int] = field(default_factory=dict)
    excused: list[str] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    settled_s: list[float] = field(default_factory=list)
    model_errs: int = 0
    """Answers that are not the known one but are what an instance alone gives: the demo model is not perfect."""
    slowest_s: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Each of these fails the storm."""


def lanes(fleet: OwnFleet, rounds: int) -> tuple[tuple[Fault, ...], ...]:
    """Every instance stopped and killed ``rounds`` times; of one role at most one is away at a time."""
    prefill: list[Fault] = []
    decode: list[Fault] = []
    for _ in range(rounds):
        for name in fleet.instances("prefill"):
            prefill += [Fault("stop", name), Fault("kill", name)]
        for name in fleet.instances("decode"):
            decode += [Fault("kill", name), Fault("stop", name)]
    return tuple(prefill), tuple(decode)


def run(fleet: OwnFleet, storm: Storm) -> Report:
    """Let a storm go over a running, idle fleet, and look at it afterwards."""
    return _Run(fleet, storm).run()


class _Run:
    def __init__(self, fleet: OwnFleet, storm: Storm) -> None:
        self._fleet, self._storm, self._report = fleet, storm, Report()
        self._model = gauges.model_of(fleet)
        self._proofs: list[Proof] = []
        self._away: list[Away] = []
        self._ended: list[Ended] = []
        self._faults: list[Future[None]] = []
        self._stopping = threading.Event()
        self._began = 0.0

    def run(self) -> Report:
        report, names = self._report, self._fleet.instances()
        rng = random.Random(self._storm.seed)
        with ThreadPoolExecutor(len(names)) as pool:  # a first forward pass compiles: up to 40 s on a busy machine
            list(pool.map(partial(self._warm, draw(rng, 0.0)), names))
        asyncio.run(self._ask([draw(rng, 0.0) for _ in range(QUIET_REQUESTS)]))  # links are made, caches allocated
        before, took_s = gauges.rest(self._fleet, names)
        report.before = _plain(before)
        held = [said for name in names for said in gauges.holdings(name, before[name])]
        report.problems += [f"before the storm, after {took_s:.0f} s of quiet, {said}" for said in held]
        self._ended.clear()
        self._began = time.monotonic()
        with ThreadPoolExecutor(len(self._storm.lanes) or 1) as pool:
            self._faults = [pool.submit(self._break, lane) for lane in self._storm.lanes]
            try:
                asyncio.run(self._blow(rng))
            finally:
                self._stopping.set()
        report.seconds = round(time.monotonic() - self._began, 1)
        self._judge_faults()
        try:
            self._ended = [self._recheck(ended) for ended in self._ended]
            self._judge_requests()
            self._judge_rest(before)
        except (FleetError, OSError) as error:
            report.problems.append(f"an instance did not answer in the quiet afterwards: {error!r}")
        return report

    # The storm ---------------------------------------------------------------------------------------------------

    async def _blow(self, rng: random.Random) -> None:
        """Requests, as many as wanted and until every lane is done."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client(number: int) -> None:
                order = draw(rng, self._storm.leave_share)
                self._ended.append(await self._one(session, order, f"storm-{number}"))

            begun, waiting = 0, set[asyncio.Task[None]]()
            while begun < self._storm.requests or not all(lane.done() for lane in self._faults):
                free = self._storm.concurrency - len(waiting)
                waiting |= {asyncio.create_task(client(begun + index)) for index in range(free)}
                begun += free
                await asyncio.sleep(max(free, 1) / self._storm.per_s)
                ended = {task for task in waiting if task.done()}
                waiting -= ended
                for task in ended:
                    task.result()
            await asyncio.gather(*waiting)

    async def _ask(self, orders: Sequence[Order]) -> None:
        """These requests, without faults."""
        limit = asyncio.Semaphore(self._storm.concurrency)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(order: Order, number: int) -> None:
                async with limit:
                    self._ended.append(await self._one(session, order, f"quiet-{number}"))

            await asyncio.gather(*(one(order, number) for number, order in enumerate(orders)))

    async def _one(self, session: aiohttp.ClientSession, order: Order, name: str) -> Ended:
        return await ask(session, self._fleet.router, self._model, order, name, self._storm.deadline_s)

    def _warm(self, order: Order, name: str) -> None:
        alone(self._fleet.url(name), self._model, order, f"warm-{name}")

    def _break(self, lane: Sequence[Fault]) -> None:
        """One lane's faults, in a thread of its own; raises where one cannot be proved."""
        for fault in lane:
            if self._stopping.wait(fault.pause_s):
                raise FleetError(f"{fault.kind} of {fault.victim}: the storm was over before its turn came")
            began = time.monotonic() - _EXCUSE_S
            if fault.kind == "kill":
                self._proofs.append(self._fleet.kill(fault.victim))
                self._proofs.append(self._fleet.restart(fault.victim))
            else:
                self._proofs.append(self._fleet.stop(fault.victim))
                self._stopping.wait(fault.stop_s)
                self._proofs.append(self._fleet.resume(fault.victim))
            self._away.append(Away(fault.victim, fault.kind, began, time.monotonic() + _EXCUSE_S))

    # The judgement -----------------------------------------------------------------------------------------------

    def _judge_faults(self) -> None:
        for lane in self._faults:
            error = lane.exception()
            if error is not None:
                self._report.problems.append(f"invalid: {error}")
        for proof in sorted(self._proofs, key=lambda each: each.at_s):
            self._report.faults.append({**asdict(proof), "at_s": round(proof.at_s - self._began, 2)})

    def _judge_requests(self) -> None:
        report, decodes = self._report, self._fleet.instances("decode", "both")
        report.requests = len(self._ended)
        report.outcomes = dict(Counter(ended.outcome for ended in self._ended))
        report.handoffs = dict(Counter(ended.handoff or "-" for ended in self._ended))
        report.slowest_s = round(max(ended.ended_s - ended.began_s for ended in self._ended), 2)
        for ended in self._ended:
            if ended.outcome in ("right", "left"):
                continue
            why = excuse(ended, self._away, decodes)
            at_s = ended.began_s - self._began
            said = f"{ended.name} at {at_s:.1f} s: {ended.outcome}, {ended.detail} (decode {ended.decode})"
            (report.excused if why else report.problems).append(f"{said}{': ' + why if why else ''}")

    def _recheck(self, ended: Ended) -> Ended:
        """A wrong answer is right where an instance alone, with nothing broken and no cache, gives the same."""
        if ended.outcome != "wrong" or ended.order is None:
            return ended
        instance = self._fleet.url(self._fleet.instances("decode", "both")[0])
        reference = alone(instance, self._model, ended.order, f"recheck-{ended.name}")
        if reference == ended.detail:
            self._report.model_errs += 1
            return replace(ended, outcome="right")
        return replace(ended, detail=f"{ended.detail!r}, alone {reference!r}, known {ended.order.prompt.value!r}")

    def _judge_rest(self, before: Mapping[str, Gauges]) -> None:
        """Everything is given back; and again, after another round, nothing has grown."""
        report, rng = self._report, random.Random(self._storm.seed + 1)
        rounds: list[dict[str, Gauges]] = []
        for _ in range(2):
            now, took_s = gauges.settle(self._fleet, before)
            report.settled_s.append(round(took_s, 1))
            report.problems += [f"after {took_s:.0f} s of quiet, {leak}" for leak in gauges.leaks(before, now)]
            self._ended.clear()
            asyncio.run(self._ask([draw(rng, 0.0) for _ in range(QUIET_REQUESTS)]))
            again = [self._recheck(ended) for ended in self._ended]
            report.problems += [f"in quiet: {one.outcome}, {one.detail}" for one in again if one.outcome != "right"]
            rounds.append(gauges.settle(self._fleet, before)[0])
        report.problems += gauges.growth(rounds[0], rounds[1], SLACK)
        report.after, report.counters = _plain(rounds[1]), gauges.counters(self._fleet)
        recomputed = sum(found["recomputed"] for found in report.counters.values())
        if self._storm.recomputes and not recomputed:
            report.problems.append("invalid: no transfer failed, though fabric.faults was to make some fail")


def excuse(ended: Ended, away: Sequence[Away], decodes: Sequence[str]) -> str:
    """Why this request need not have been answered; empty when it should have been.

    A stream may be cut after its first byte when the instance that wrote it was killed meanwhile. No answer at all is
    excused only while every decode instance was away at once.
    """
    if ended.outcome == "cut":
        for one in away:
            if one.kind == "kill" and one.victim == ended.decode and _overlap(one, ended):
                return f"{one.victim} was killed while it wrote the answer"
    if ended.outcome == "no_answer":
        gone = [[one for one in away if one.victim == name and _overlap(one, ended)] for name in decodes]
        moments = [one.from_s for each in gone for one in each] + [ended.began_s]
        if any(all(any(one.from_s <= at <= one.until_s for one in each) for each in gone) for at in moments):
            return "every decode instance was away"
    return ""


def _overlap(one: Away, ended: Ended) -> bool:
    return one.from_s <= ended.ended_s and one.until_s >= ended.began_s


def _plain(found: Mapping[str, Gauges]) -> dict[str, Any]:
    return {name: asdict(each) for name, each in found.items()}
