"""Streams that never break: instances are killed one after the other, and every client reads its whole answer.

The answers are long recitations (recall.py) at temperature 0, so each has one right text, which an instance alone was
asked for beforehand. A run in which no stream had to be resumed proves nothing, and says so.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.plain import post, scrape, total
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.core.errors import FleetError

_ANSWER_S = 300.0
_TURN_S = 0.2
WAYS = ("continue", "replay", "finish", "approximate", "none")


@dataclass(frozen=True)
class Plan:
    """What is asked, and how often somebody dies."""

    kills: int = 6
    every_s: float = 10.0
    seconds_max: float = float("inf")
    """No kill later than this, however many have been."""
    streams: int = 16
    prompts: int = 24
    facts: int = 60
    """Of a prompt; the answer recites most of them."""
    chat_share: float = 0.0
    seed: int = 0


@dataclass
class Report:
    """What came of it. Seconds are since the first kill."""

    seconds: float = 0.0
    streams: int = 0
    equal: int = 0
    kills: list[dict[str, Any]] = field(default_factory=list)
    resumes: dict[str, float] = field(default_factory=dict)
    retries: float = 0.0
    slowest_s: float = 0.0
    longest_silence_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    """Each of these fails the run."""

    def plain(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


class Kills:
    """One run over a running fleet."""

    def __init__(self, fleet: OwnFleet, plan: Plan, model: str) -> None:
        self._fleet, self._plan, self._model = fleet, plan, model
        self._report = Report()
        self._stop = threading.Event()
        self._began = 0.0

    def run(self) -> Report:
        """Ask, kill, compare."""
        rng = random.Random(self._plan.seed)
        texts = [make_prompt(rng, self._plan.facts, asked=rng.randrange(5)).text for _ in range(self._plan.prompts)]
        with ThreadPoolExecutor(len(self._fleet.instances())) as pool:  # a first forward pass compiles
            list(pool.map(lambda name: self._alone(name, texts[0]), self._fleet.instances()))
        alone = self._fleet.instances("decode")[0]
        right = [self._alone(alone, text) for text in texts]
        before = self._counters()
        self._began = time.monotonic()
        with ThreadPoolExecutor(1 + self._plan.kills) as pool:
            killer = pool.submit(self._kill_all, pool)
            try:
                asyncio.run(self._ask_all(texts, right, killer))
            finally:
                self._stop.set()
            killer.result()
        self._judge(before)
        return self._report

    def _alone(self, name: str, text: str) -> str:
        found, _ = post(f"{self._fleet.url(name)}/v1/completions", self._body(text), timeout_s=_ANSWER_S)
        answer: str = found["choices"][0]["text"]
        return answer

    def _body(self, text: str) -> dict[str, Any]:
        return {"model": self._model, "prompt": text, "max_tokens": 8 * self._plan.facts, "temperature": 0}

    # The clients -------------------------------------------------------------------------------------------------

    async def _ask_all(self, texts: Sequence[str], right: Sequence[str], killer: Future[None]) -> None:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
            asyncio.TaskGroup() as group,
        ):
            for lane in range(self._plan.streams):
                group.create_task(self._lane(session, lane, texts, right, killer))

    async def _lane(
        self,
        session: aiohttp.ClientSession,
        lane: int,
        texts: Sequence[str],
        right: Sequence[str],
        killer: Future[None],
    ) -> None:
        number = lane
        while not killer.done():
            at = number % len(texts)
            began = time.monotonic()
            said = await self._stream(session, f"kills-{number}", texts[at])
            self._report.streams += 1
            self._report.slowest_s = max(self._report.slowest_s, round(time.monotonic() - began, 2))
            if said == right[at]:
                self._report.equal += 1
            else:
                when = time.monotonic() - self._began
                self._report.problems.append(f"stream {number}, ended at {when:.1f} s: {_differ(said, right[at])}")
            number += self._plan.streams

    async def _stream(self, session: aiohttp.ClientSession, name: str, text: str) -> str:
        """The text of one streamed answer; what went wrong is text, too, and equal to no answer."""
        said: list[str] = []
        done, heard = 0, time.monotonic()
        body, headers = {**self._body(text), "stream": True}, {"x-request-id": name}
        try:
            async with session.post(f"{self._fleet.router}/v1/completions", json=body, headers=headers) as answer:
                if answer.status != 200:
                    return f"<status {answer.status}: {await answer.text()}>"
                async for line in answer.content:
                    now = time.monotonic()
                    self._report.longest_silence_s = max(self._report.longest_silence_s, round(now - heard, 2))
                    heard = now
                    if not line.startswith(b"data: "):
                        continue
                    if line.strip() == b"data: [DONE]":
                        done += 1
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"<{''.join(said)[-40:]!r} and then {event['error']}>"
                    said += [choice["text"] for choice in event["choices"]]
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"<{error!r}>"
        return "".join(said) if done == 1 else f"<{done} times [DONE]>"

    # The killer --------------------------------------------------------------------------------------------------

    def _kill_all(self, pool: ThreadPoolExecutor) -> None:
        """Kill one of each role in turn, ``every_s`` apart at least, and start it again."""
        away: list[Future[Any]] = []
        roles = ("prefill", "decode")
        last = self._began
        for number in range(self._plan.kills):
            self._stop.wait(max(0.0, last + self._plan.every_s - time.monotonic()))
            late = time.monotonic() - self._began > self._plan.seconds_max
            victim = None if late else self._victim(roles[number % 2])
            if victim is None:
                break
            last = time.monotonic()
            proof = self._fleet.kill(victim)
            self._report.kills.append({"victim": victim, "at_s": round(proof.at_s - self._began, 1), "how": proof.seen})
            away.append(pool.submit(self._fleet.restart, victim))
        for one in away:
            one.result()

    def _victim(self, role: str) -> str | None:
        """A ready instance of this role, once another instance is there to take over its streams."""
        until = time.monotonic() + _ANSWER_S
        while not self._stop.is_set():
            try:
                ready = [name for name, member in self._fleet.members().items() if member.state == "ready"]
            except (FleetError, OSError):
                ready = []
            fitting = [name for name in self._order(role) if name in ready]
            if fitting and len(ready) > 1:
                return fitting[0]
            if time.monotonic() > until:
                raise FleetError(f"no {role} instance was ready within {_ANSWER_S:.0f} s")
            self._stop.wait(_TURN_S)
        return None

    def _order(self, role: str) -> list[str]:
        """Those that were killed least often first."""
        killed = Counter(kill["victim"] for kill in self._report.kills)
        return sorted(self._fleet.instances(role), key=lambda name: (killed[name], name))

    # The judgement -----------------------------------------------------------------------------------------------

    def _counters(self) -> dict[str, float]:
        page = scrape(self._fleet.router_admin)
        found = {way: total(page, "vllm_fleet_router_resumes_total", way=way) for way in WAYS}
        return {**found, "retries": total(page, "vllm_fleet_router_retries_total")}

    def _judge(self, before: dict[str, float]) -> None:
        report, now = self._report, self._counters()
        report.seconds = round(time.monotonic() - self._began, 1)
        report.retries = now.pop("retries") - before["retries"]
        report.resumes = {way: count - before[way] for way, count in now.items() if count > before[way]}
        if len(report.kills) < self._plan.kills and self._plan.seconds_max == float("inf"):
            report.problems.append(f"invalid: {len(report.kills)} of {self._plan.kills} kills happened")
        if not sum(count for way, count in report.resumes.items() if way != "none"):
            report.problems.append("invalid: no stream had to be resumed")


def _differ(said: str, right: str) -> str:
    if said.startswith("<"):
        return said
    same = next((at for at, (one, other) in enumerate(zip(said, right, strict=False)) if one != other), None)
    at = min(len(said), len(right)) if same is None else same
    around = slice(max(0, at - 20), at + 20)
    return f"differs at {at} of {len(right)}: {said[around]!r}, not {right[around]!r}"
