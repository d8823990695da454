"""The controller in the simulation: the real reactor, journal and store, without sockets, with crashes and pauses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.sim.clockwork import Clockwork
from vllm_fleet.controller import engine, journal, reactor, wishes
from vllm_fleet.controller.effects import Announce, Broadcast, Effect, Reply, Save
from vllm_fleet.controller.state import FleetState, Rules
from vllm_fleet.controller.stores.contract import StoreFailed
from vllm_fleet.controller.stores.memory import Crashed, MemoryDisk, MemoryStore
from vllm_fleet.controller.turns import Decide
from vllm_fleet.controller.watchers import first_events
from vllm_fleet.wire import control

RULES = Rules()


@dataclass(frozen=True)
class Request:
    """One HTTP request as bytes; ``generation`` belongs to a DELETE."""

    method: str
    name: str
    body: bytes = b""
    generation: int = 0


class SimEnv:
    """The simulated process's clock: the world's, faster or slower, and with steps."""

    def __init__(self, clockwork: Clockwork, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rate = 1.0
        self._set, self._set_at = 1000.0, clockwork.now
        self._clockwork = clockwork

    def now(self) -> float:
        return self._set + (self._clockwork.now - self._set_at) * self.rate

    def step(self, seconds: float) -> None:
        """Somebody sets the clock."""
        self._set += seconds

    def run_at(self, rate: float) -> None:
        """From now on it goes so many times as fast as the world's."""
        self._set, self._set_at, self.rate = self.now(), self._clockwork.now, rate

    def wall(self) -> float:
        return 0.0

    def new_id(self) -> str:
        return f"{self.rng.getrandbits(128):032x}"


class SimController:
    """A controller process that can crash, pause and lose its disk. Every turn is checked as it happens."""

    def __init__(self, clockwork: Clockwork, seed: int) -> None:
        self.env = SimEnv(clockwork, seed)
        self.disk = MemoryDisk()
        self.state: FleetState | None = None
        self.streams: list[Callable[[bytes], None]] = []
        self.paused_until = 0.0
        self.starts = 0
        self.turns = 0
        self.granted: dict[str, dict[int, str]] = {}
        self.granted_wishes: dict[tuple[str, int], control.Desired] = {}
        self._clockwork = clockwork
        self._store = MemoryStore(self.disk)
        self._life = 0
        self._ticks = 0
        self._heard: dict[tuple[str, int], int] = {}
        """By name and generation: the tick before its last sign of life that was answered."""
        self._started_tick = 0

    def start(self) -> None:
        """Start from what the disk holds."""
        if self.state is not None:
            return
        self._store = MemoryStore(self.disk)
        try:
            self.state = engine.restore(self._store, RULES, "sim", self.env)
        except StoreFailed:
            self._clockwork.at(1.0, self.start)  # a supervisor tries again
            return
        self.starts += 1
        self._life += 1
        known = max((max(lives) for lives in self.granted.values()), default=0)
        assert self.state.generation >= known, f"restart forgot generation {known}"
        self._heard, self._started_tick = {}, self._ticks
        self._schedule_tick(self._life)

    def crash(self) -> None:
        """Lose everything but the disk."""
        self.state = None
        self.streams.clear()
        self._life += 1

    def receive(self, request: Request, answer: Callable[[int, bytes], None]) -> None:
        """One request arrives; a paused process reads it when it goes on, a dead one never does."""
        if self._clockwork.now < self.paused_until:
            self._clockwork.at(self.paused_until - self._clockwork.now, lambda: self.receive(request, answer))
            return
        if self.state is None:
            return
        before = _digest(self.state)
        held = self.state.members.get(request.name)
        reply, said = self._turn(self._decision(request))
        if self.state is None:
            return  # it crashed while saving
        assert reply is not None
        self._check(request, before, held, reply, said)
        answer(reply.status, b"" if reply.body is None else control.encode(reply.body))

    def watch(self, since: int | None, journal_id: str | None, send: Callable[[bytes], None]) -> bool:
        """Open a watch stream; False when nobody answers."""
        if self.state is None or self._clockwork.now < self.paused_until:
            return False
        for event in first_events(self.state, since, journal_id):
            send(control.encode(event))
        self.streams.append(send)
        return True

    def _decision(self, request: Request) -> Decide:
        if request.method == "register":
            register = control.decode_register(request.body)
            return lambda state, now: reactor.on_register(state, register, now)
        if request.method == "desire":
            wish = control.decode_desired(request.body)
            return lambda state, now: wishes.on_desire(state, wish, now)
        if request.method == "drain":
            drain = control.decode_drain(request.body)
            return lambda state, now: wishes.on_drain(state, request.name, drain, now)
        if request.method == "heartbeat":
            beat = control.decode_heartbeat(request.body)
            return lambda state, now: reactor.on_heartbeat(state, request.name, beat, now)
        return lambda state, now: reactor.on_deregister(state, request.name, request.generation, now)

    def _turn(self, decide: Decide) -> tuple[Reply | None, list[Effect]]:
        """What engine.Engine does in a turn, without waiting."""
        state = self.state
        assert state is not None
        self.turns += 1
        effects = decide(state, self.env.now())
        entries = reactor.to_save(state, effects)
        failed = False
        try:
            if entries:
                self._store.append(entries)
        except StoreFailed:
            failed = True
        except Crashed:
            self.crash()
            return None, []
        shown = reactor.settle(state, effects, self.env.now(), failed=failed, new_controller=self.env.new_id())
        return self._show(state, shown), shown

    def _show(self, state: FleetState, effects: list[Effect]) -> Reply | None:
        reply = None
        for effect in effects:
            if isinstance(effect, Broadcast):
                self._publish(control.encode(effect.change))
            elif isinstance(effect, Announce):
                self._publish(control.encode(effect.snapshot))
            elif isinstance(effect, Save):
                self._rewrite(state)
            elif isinstance(effect, Reply):
                reply = effect
        return reply

    def _rewrite(self, state: FleetState) -> None:
        try:
            self._store.rewrite(journal.to_records(state))
        except StoreFailed:
            return
        reactor.on_saved(state)

    def _publish(self, line: bytes) -> None:
        for send in list(self.streams):
            send(line)

    def _schedule_tick(self, life: int) -> None:
        def tick() -> None:
            if self.state is None or self._life != life:
                return
            if self._clockwork.now < self.paused_until:
                self._clockwork.at(self.paused_until - self._clockwork.now, tick)
                return
            self._ticks += 1
            self._turn(self._judge_silence)
            self._clockwork.at(RULES.tick_s / self.env.rate, tick)

        self._clockwork.at(RULES.tick_s / self.env.rate, tick)

    def _judge_silence(self, state: FleetState, now: float) -> list[Effect]:
        """on_tick, and whether it waited long enough: ticks go on only while the controller listens, whatever its
        clock says.
        """
        effects = reactor.on_tick(state, now)
        for effect in effects:
            if isinstance(effect, Broadcast) and isinstance(effect.change, control.Change):
                member = effect.change.member
                heard = self._heard.get((member.name, member.generation), self._started_tick)
                silent_s = (self._ticks - heard + 2) * RULES.tick_s
                least_s = RULES.lease_s if member.state == "gone" else RULES.suspect_s
                assert silent_s >= least_s, f"{member.name} is {member.state} after {silent_s} s of silence"
        return effects

    def _check(
        self, request: Request, before: object, held: control.Member | None, reply: Reply, said: list[Effect]
    ) -> None:
        assert self.state is not None
        self._note_heard(request, reply)
        if request.method == "desire":
            made = reply.body
            if isinstance(made, control.Desired):
                assert made.instances == control.decode_desired(request.body).instances, "another wish was granted"
                known = self.granted_wishes.setdefault((self.state.controller, made.revision), made)
                assert known == made, f"two wishes have revision {made.revision}"
        elif request.method != "register":
            generation = request.generation or control.decode_heartbeat(request.body).generation
            if held is not None and generation != held.generation:
                assert said == [reply], f"a message of generation {generation} of {request.name} had effects: {said}"
                assert reply.status in (404, 409), (
                    f"generation {generation} of {request.name} was answered {reply.status}"
                )
                assert _digest(self.state) == before, f"generation {generation} of {request.name} changed the state"
        elif isinstance(reply.body, control.Registered):
            self._check_grant(control.decode_register(request.body), reply.body.generation)

    def _note_heard(self, request: Request, reply: Reply) -> None:
        if isinstance(reply.body, control.Registered):
            self._heard[request.name, reply.body.generation] = self._ticks
        elif isinstance(reply.body, control.HeartbeatAck):
            self._heard[request.name, control.decode_heartbeat(request.body).generation] = self._ticks

    def _check_grant(self, request: control.Register, generation: int) -> None:
        lives = self.granted.setdefault(request.name, {})
        if generation in lives:
            assert lives[generation] == request.incarnation, f"generation {generation} was given to two lives"
            return
        assert generation > max(lives, default=0), f"generation {generation} of {request.name} is not new"
        lives[generation] = request.incarnation


def _digest(state: FleetState) -> object:
    return state.controller, state.revision, state.generation, dict(state.members), dict(state.past)
