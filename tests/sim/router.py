"""A simulated fleet behind a real router: the code that runs requests, with simulated time, instances and clients.

Instances die, stop, fail, say that they are busy, come back; the controller's news come late or not at all. Then all
faults heal. Every request ends once, with the right tokens, or for a reason that the faults explain.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from tests.sim.router_model import Heard, Stream, hear
from tests.sim.virtual_loop import VirtualLoop
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.router.audit import Audit
from vllm_fleet.router.call import Call
from vllm_fleet.router.exchange import Exchange
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.headers import Pairs
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.openai import Route, parse_request
from vllm_fleet.router.policies.least_load import LeastLoad
from vllm_fleet.router.reply import ClientGone
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.router.timeline import Timeline
from vllm_fleet.router.upstream import UpstreamFailure
from vllm_fleet.wire.control import Change, Member, Snapshot, State
from vllm_fleet.wire.names import Role
from vllm_fleet.wire.ticket import WorkerAddress

FAULTS_S = 60.0
HEAL_S = 60.0
REQUEST_S = 40.0
RULES = RequestRules(
    first_byte_s=4.0, stall_s=2.0, in_flight_max=12, queue_max=6, queue_s=10.0, attempts_max=4, retry_budget=10.0
)
STREAM = [("content-type", "text/event-stream; charset=utf-8")]
JSON = [("content-type", "application/json")]


@dataclass
class Outcome:
    """What happened under one seed; ``broken`` says which promise did not hold."""

    seed: int
    broken: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        seen = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        return f"seed {self.seed}: {self.broken or 'all promises held'}\n  seen: {seen}"


class SimEnv:
    """Simulated time and chance."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return self.now()

    def new_id(self) -> str:
        return f"{self.rng.getrandbits(128):032x}"


class Instance:
    """One instance over all its lives."""

    def __init__(self, name: str, role: Role, rng: random.Random) -> None:
        self.name, self.role, self.rng = name, role, rng
        self.life, self.alive, self.sick, self.busy = 1, True, False, False
        self.going = asyncio.Event()
        """Not set: stopped by SIGSTOP."""
        self.going.set()
        self.sleepers: dict[asyncio.Future[None], None] = {}
        self.running = 0

    def member(self) -> Member:
        workers = (WorkerAddress("127.0.0.1", 1),) if self.role == "prefill" else ()
        return Member(
            name=self.name,
            role=self.role,
            url=f"http://{self.name}",
            pid=1,
            incarnation=f"{self.name}-{self.life}",
            generation=self.life,
            state="ready",
            fingerprint={},
            workers=workers,
        )

    def die(self) -> None:
        self.alive = False
        self.life += 1
        for sleeper in list(self.sleepers):
            if not sleeper.done():
                sleeper.set_exception(UpstreamFailure("disconnected", "it died"))

    async def sleep(self, seconds: float) -> None:
        """Work for so long; not while stopped, and not beyond its death."""
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        self.sleepers[sleeper] = None
        timer = loop.call_later(seconds, _wake, sleeper)
        try:
            await sleeper
            while not self.going.is_set():
                await self.sleep(0.1)
        finally:
            timer.cancel()
            self.sleepers.pop(sleeper, None)


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


class SimAnswer:
    """An answer whose headers are here."""

    def __init__(self, instance: Instance, status: int, headers: Pairs, parts: list[bytes], pace_s: float) -> None:
        self._instance, self._parts, self._pace_s = instance, parts, pace_s
        self.status, self.headers = status, headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events come one by one, several at once, or in halves."""
        rng, kept = self._instance.rng, b""
        for part in self._parts:
            kept += part
            drawn = rng.random()
            if drawn < 0.2:
                continue
            await self._instance.sleep(self._pace_s)
            end = rng.randrange(len(kept)) if drawn < 0.3 else len(kept)
            chunk, kept = kept[:end], kept[end:]
            if chunk:
                yield chunk
        if kept:
            await self._instance.sleep(self._pace_s)
            yield kept

    async def read(self, bytes_max: int) -> bytes:
        return b"".join([part async for part in self.chunks()])


class Posted:
    """One request at one instance."""

    def __init__(self, world: World, instance: Instance, path: str, headers: Mapping[str, str], body: bytes) -> None:
        self._world, self._instance, self._path = world, instance, path
        self._id, self._body = headers["x-request-id"], json.loads(body)
        self._entered = False

    async def __aenter__(self) -> SimAnswer:
        instance, world = self._instance, self._world
        if not instance.alive:
            await asyncio.sleep(0.001)
            raise UpstreamFailure("refused", "nobody listens")
        instance.running += 1
        self._entered = True
        try:
            await instance.sleep(world.rng.uniform(0.001, 0.02))
        except BaseException:
            await self.__aexit__()
            raise
        world.asked[self._id] += 1
        return self._answer()

    def _answer(self) -> SimAnswer:
        instance, rng, counts = self._instance, self._world.rng, self._world.outcome.counts
        if instance.busy:
            counts["busy"] += 1
            return SimAnswer(instance, 503, [*JSON, ("Retry-After", "1")], [b"{}"], 0.0)
        if instance.sick and rng.random() < 0.5:
            counts["5xx"] += 1
            return SimAnswer(instance, 500, JSON, [b'{"error":{"message":"sick"}}'], 0.001)
        assert (self._body.get("max_tokens") or 1) >= 1, "asked for no token"
        stream = Stream(self._path, self._body, self._id, rng, merge=rng.choice((0.0, 0.3)))
        pace_s = rng.uniform(0.001, 0.2)
        if self._body.get("stream"):
            parts = list(stream.events())
            if instance.sick and rng.random() < 0.5:
                counts["engine died"] += 1
                error = b'data: {"error": {"message": "died", "type": "InternalServerError", "code": 500}}\n\n'
                parts = [*parts[: rng.randrange(len(parts))], error, b"data: [DONE]\n\n"]
            return SimAnswer(instance, 200, STREAM, parts, pace_s)
        whole = hear(b"".join(stream.events()))
        answer = {"choices": [{"text": whole.text, "finish_reason": whole.finish}]}
        return SimAnswer(instance, 200, JSON, [json.dumps(answer).encode()], 10 * pace_s)

    async def __aexit__(self, *_: object) -> None:
        if self._entered:
            self._entered = False
            self._instance.running -= 1


class SimUpstream:
    """Connections to simulated instances."""

    def __init__(self, world: World) -> None:
        self._world = world

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Posted:
        host, _, path = url.removeprefix("http://").partition("/")
        return Posted(self._world, self._world.instances[host], "/" + path, headers, body)


class Client:
    """One client's connection; may hang up, may read slowly."""

    def __init__(self, rng: random.Random) -> None:
        self.status, self.got, self.cut, self.starts = 0, b"", False, 0
        self.leaves_after = rng.randrange(40) if rng.random() < 0.05 else None
        self._slow = rng.random() < 0.1

    async def start(self, status: int, pairs: Pairs, length: int | None) -> None:
        self.starts += 1
        self.status = status

    async def write(self, data: bytes) -> None:
        self.got += data
        if self._slow:
            await asyncio.sleep(0.1)
        if self.leaves_after is not None:
            self.leaves_after -= 1
            if self.leaves_after < 0:
                raise ClientGone

    def abort(self) -> None:
        self.cut = True


SHAPES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "stream_options": {"include_usage": True}},
    {"temperature": 0, "stop": ["the ", "xb"]},
    {"temperature": 0, "stop": "the ", "include_stop_str_in_output": True},
    {"temperature": 0, "presence_penalty": 1.0},
    {"temperature": 0, "response_format": {"type": "json_object"}},
    {"temperature": 0, "return_token_ids": True, "stream_options": {"continuous_usage_stats": True}},
    {"temperature": 0.5, "seed": 4},
    {"temperature": 0.5, "seed": 5, "stop": ["the "]},
)


class World:
    """One seed's."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.outcome = Outcome(seed)
        self.asked: Counter[str] = Counter()
        self.instances: dict[str, Instance] = {}
        self.cancelled_at_heal = False

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        names: tuple[tuple[str, Role], ...] = (
            *(("rock", "decode"), ("d1", "decode"), ("d2", "decode"), ("b1", "both")),
            *(("p1", "prefill"), ("p2", "prefill")),
        )
        self.instances = {name: Instance(name, role, self.rng) for name, role in names}
        view, audit, env = FleetView(), Audit(), SimEnv(self.rng)
        self.view, self.revision = view, 1
        self.exchange = Exchange(
            *(view, SimUpstream(self), audit, Metrics(view, audit), env),  # type: ignore[arg-type]
            prefill_policy=LeastLoad(),
            decode_policy=LeastLoad(),
            mint=lambda member: (b'{"hold":1}', b'{"load":1}'),
            rules=RULES,
        )
        self.exchange.apply(Snapshot("c", 1, tuple(one.member() for one in self.instances.values())))
        faults = asyncio.create_task(self._faults(), name="faults")
        requests: list[asyncio.Task[None]] = []
        while loop.time() < FAULTS_S:
            await asyncio.sleep(self.rng.expovariate(2.0))
            burst = 15 if self.rng.random() < 0.02 else 1
            requests += [asyncio.create_task(self._request(len(requests) + at)) for at in range(burst)]
        await faults
        self._heal()
        done, late = await asyncio.wait(requests, timeout=REQUEST_S + 2.0)
        assert not late, f"{len(late)} requests did not end"
        for task in done:
            task.result()
        await self._quiet()

    # Faults --------------------------------------------------------------------------------------------------------

    async def _faults(self) -> None:
        loop = asyncio.get_running_loop()
        victims = [one for name, one in self.instances.items() if name != "rock"]
        kinds = {
            self.kill: 4.0 * self.rng.random(),
            self.stop: 2.0 * self.rng.random(),
            self.sicken: 2.0 * self.rng.random(),
            self.occupy: 2.0 * self.rng.random(),
        }
        while loop.time() < FAULTS_S:
            await asyncio.sleep(self.rng.expovariate(0.8))
            (fault,) = self.rng.choices(list(kinds), list(kinds.values()))
            victim = self.rng.choice(victims)
            if victim.alive:
                fault(victim)

    def kill(self, victim: Instance) -> None:
        """It dies; the controller finds out, or not; it comes back."""
        self.outcome.counts["kill"] += 1
        before = victim.member()
        victim.die()
        loop = asyncio.get_running_loop()
        if self.rng.random() < 0.7:
            loop.call_later(self.rng.uniform(0.0, 5.0), lambda: self._tell(before, "gone"))
        loop.call_later(self.rng.uniform(1.0, 10.0), lambda: self._back(victim))

    def _back(self, victim: Instance) -> None:
        victim.alive, victim.sick, victim.busy = True, False, False
        victim.going.set()
        self._tell(victim.member(), "ready")

    def _tell(self, member: Member, state: State) -> None:
        current = self.instances[member.name]
        if state == "gone" and current.alive and current.member().incarnation != member.incarnation:
            return  # its next life has registered
        self.revision += 1
        self.exchange.apply(Change(self.revision, structs.replace(member, state=state)))

    def stop(self, victim: Instance) -> None:
        """SIGSTOP, and SIGCONT later."""
        self.outcome.counts["stop"] += 1
        victim.going.clear()
        asyncio.get_running_loop().call_later(self.rng.uniform(0.5, 15.0), victim.going.set)

    def sicken(self, victim: Instance) -> None:
        """It answers 5xx, and its engine dies in the middle of streams."""
        self.outcome.counts["sicken"] += 1
        victim.sick = True
        asyncio.get_running_loop().call_later(self.rng.uniform(0.5, 8.0), lambda: setattr(victim, "sick", False))

    def occupy(self, victim: Instance) -> None:
        """It says that it is busy."""
        self.outcome.counts["occupy"] += 1
        victim.busy = True
        asyncio.get_running_loop().call_later(self.rng.uniform(0.5, 8.0), lambda: setattr(victim, "busy", False))

    def _heal(self) -> None:
        for one in self.instances.values():
            one.sick = one.busy = False
            one.going.set()
            if not one.alive:
                self._back(one)

    # Clients -------------------------------------------------------------------------------------------------------

    async def _request(self, number: int) -> None:
        rng, loop = self.rng, asyncio.get_running_loop()
        body: dict[str, Any] = {**rng.choice(SHAPES), "max_tokens": rng.randrange(1, 60)}
        route = rng.choice((Route.COMPLETIONS, Route.CHAT))
        prompt = f"prompt {rng.randrange(50)}"
        body |= {"messages": [{"role": "user", "content": prompt}]} if route is Route.CHAT else {"prompt": prompt}
        body["stream"] = rng.random() < 0.85
        if not body["stream"]:
            body.pop("stream_options", None)
        sent, request_id = json.dumps(body).encode(), f"r{number}"
        client, now = Client(rng), loop.time()
        headers = {"authorization": f"Bearer {rng.randrange(3)}"}
        timeline = Timeline(request_id, route.value, now)
        deadline = Deadline(now + REQUEST_S, "router.request_timeout_s", now)
        call = Call(parse_request(route, sent), headers, request_id, now, deadline, timeline)
        try:
            await self.exchange.run(call, client)
        except ClientGone:
            self.outcome.counts["client left"] += 1
            assert client.leaves_after is not None, "nobody left"
            return
        assert loop.time() <= now + REQUEST_S + 2.0, "later than its deadline"
        assert client.starts == 1, f"started {client.starts} times"
        self._check(client, route, body, request_id, timeline)

    def _check(self, client: Client, route: Route, body: dict[str, Any], request_id: str, timeline: Timeline) -> None:
        counts = self.outcome.counts
        right = hear(b"".join(Stream(route.value, body, request_id, random.Random(0)).events()))
        counts["resumed"] += timeline.resumes
        counts["retried"] += timeline.retries
        if client.status != 200:
            code = json.loads(client.got).get("error", {}).get("code")
            counts[f"status {client.status}"] += 1
            tries = self.asked[request_id]
            full = self.exchange.running >= RULES.in_flight_max
            explained = full if client.status == 429 else tries >= RULES.attempts_max
            assert explained, f"{request_id}: {client.status} {code} after {tries} tries, {timeline.facts()}"
            return
        if not body["stream"]:
            assert json.loads(client.got)["choices"][0]["text"] == right.text, f"{request_id}: a wrong answer"
            counts["answered"] += 1
            return
        heard = hear(client.got)
        if heard.error is not None:
            raise AssertionError(f"{request_id}: a stream ended with {heard.error}, {timeline.facts()}")
        self._equal(heard, right, request_id)
        counts["streamed"] += 1

    def _equal(self, heard: Heard, right: Heard, request_id: str) -> None:
        for name in ("text", "roles", "finish", "stop", "tokens", "prompts", "usage", "done", "ids_shown"):
            found, wanted = getattr(heard, name), getattr(right, name)
            assert found == wanted, f"{request_id}: {name} is {found!r}, not {wanted!r}"
        assert heard.counts[-1:] == right.counts[-1:], f"{request_id}: counted {heard.counts[-1:]}"
        assert len(heard.heads) == 1, f"{request_id}: {heard.heads}"

    async def _quiet(self) -> None:
        """After the last request nothing is left of any."""
        await asyncio.sleep(HEAL_S)
        left = {name: self.view.in_flight(name) for name in self.instances if self.view.in_flight(name)}
        assert not left, f"in flight: {left}"
        busy = {name: one.running for name, one in self.instances.items() if one.running}
        assert not busy, f"work that nobody waits for: {busy}"
        assert (self.exchange.live, self.exchange.idle.is_set()) == (0, True)
        assert len(self.view.ready(asyncio.get_running_loop().time())) == len(self.instances), "somebody is left out"
        await self.exchange.close()
        others = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not others, f"tasks left: {others}"


def run_seed(seed: int) -> Outcome:
    """One simulated fleet."""
    world, loop = World(seed), VirtualLoop()
    problems: list[str] = []
    loop.set_exception_handler(lambda _, context: problems.append(str(context.get("exception") or context["message"])))
    try:
        loop.run_until_complete(world.run())
    except Exception as error:  # noqa: BLE001  whatever breaks is the outcome
        world.outcome.broken = f"{type(error).__name__}: {error}"
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
    if problems and not world.outcome.broken:
        world.outcome.broken = problems[0]
    return world.outcome
