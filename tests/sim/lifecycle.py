"""A simulated fleet with a supervisor and a router: the real decisions of controller, launcher and router's view.

Instances are lives with requests in flight; orders come at random; the network loses, doubles and delays; instances and
the controller die. Then all faults heal, and the fleet must become what it is to be.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim.clockwork import Clockwork, Faults, Network
from tests.sim.controller_sim import Request, SimController
from tests.sim.members import SimLife, SimWatcher
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.launcher import desired, events, reactor
from vllm_fleet.launcher.fleet import Child, Fleet, Rules
from vllm_fleet.wire import control
from vllm_fleet.wire.control import Desired, Load, Slot
from vllm_fleet.wire.names import ROLES

FAULTS_S = 90.0
HEAL_S = 150.0
FIRST = (Slot("prefill-0", "prefill"), Slot("decode-0", "decode"), Slot("decode-1", "decode"))
RULES = Rules(drain_s=30.0, restarts_max=10_000, ready_s=20.0)
ANSWER_S = 2.0  # a call that has no answer by then has failed


@dataclass
class Outcome:
    """What happened under one seed; ``broken`` says which promise did not hold."""

    seed: int
    broken: str = ""
    counts: Counter[str] = field(default_factory=Counter)


class Instance(SimLife):
    """A life with requests; a fifth of them leaves KV behind for a while."""

    requests = 0
    held = 0

    @property
    def load(self) -> Load:
        return Load(self.requests, self.held)


class Calls:
    """Questions to the controller that fail where no answer comes in time."""

    def __init__(self, clockwork: Clockwork, network: Network, controller: SimController) -> None:
        self._clockwork, self._network, self._controller = clockwork, network, controller

    def ask(self, request: Request, take: Callable[[int, bytes], None]) -> None:
        """``take`` is called once: with the answer, or with status 0."""
        done = False

        def once(status: int, body: bytes) -> None:
            nonlocal done
            if not done:
                done = True
                take(status, body)

        def answer(status: int, body: bytes) -> None:
            self._network.send(lambda: once(status, body))

        self._network.send(lambda: self._controller.receive(request, answer))
        self._clockwork.at(ANSWER_S, lambda: once(0, b""))

    def desired(self, take: Callable[[Desired | None], None]) -> None:
        """What the fleet is to be, as GET says."""
        state = self._controller.state
        take(None if state is None or self._network.faults.loss == 1.0 else state.desired)

    def desire(self, wish: Desired, take: Callable[[Desired | None], None]) -> None:
        """PUT; None when it was refused or failed."""

        def taken(status: int, body: bytes) -> None:
            take(control.decode_desired(body) if status == 200 else None)

        self.ask(Request("desire", "", control.encode(wish)), taken)


class Supervisor:
    """The launcher's reactor, and processes that are lives."""

    def __init__(self, world: World) -> None:
        self._world = world
        children = {name: Child(name, name) for name in ("controller", "router")}
        children |= {slot.name: Child(slot.name, "instance", role=slot.role) for slot in FIRST}
        self.fleet = Fleet(children, RULES, FIRST, rng=world.rng)
        self.lives: dict[str, Instance] = {}
        self._buried: set[str] = set()
        self._declared = False
        self._take(events.Began())
        self._take(events.Answered("controller", healthy=True))
        self._take(events.Answered("router", healthy=True))
        self._turn()

    def _turn(self) -> None:
        watcher = self._world.supervisors_view
        if watcher.revision >= 0:
            self._take(events.Watched(watcher.desired, dict(watcher.members)))
        for name, life in list(self.lives.items()):
            if not life.alive and life.incarnation not in self._buried:
                self._buried.add(life.incarnation)
                self._take(events.Exited(name, 0 if life.left else -9))
        self._take(events.Tick())
        self._world.clockwork.at(0.25, self._turn)

    def _take(self, event: events.Event) -> None:
        for effect in reactor.step(self.fleet, event, self._world.clockwork.now):
            self._do(effect)

    def _do(self, effect: events.Effect) -> None:
        match effect:
            case events.Start(name) if name not in ("controller", "router"):
                self.lives[name] = self._world.born(name)
            case events.Probe(name):
                life = self.lives[name]
                healthy = life.alive and self._world.clockwork.now >= life.ready_at
                self._world.clockwork.at(0.1, lambda: self._take(events.Answered(name, healthy)))
            case events.Terminate(name):
                self._terminate(self.lives[name])
            case events.Kill(name):
                self.lives[name].alive = False
            case events.Note(kind):
                self._world.outcome.counts[kind] += 1
            case events.Declare():
                self._declare()
            case events.AskDrain(name, generation):
                self._ask_drain(name, generation)
            case events.Forget(name):
                self._world.outcome.counts["forgotten"] += 1
            case _:
                pass

    def _terminate(self, life: Instance) -> None:
        child = self.fleet.children[life.name]
        if child.leaving is not None and not self._world.router_is_behind(life):
            assert not life.requests, f"{life.name} is stopped with {life.requests} requests"
            assert not life.held, f"{life.name} is stopped with KV that is waited for"
            self._world.outcome.counts["left in order"] += 1
        life.leave()

    def _declare(self) -> None:
        def found(now: Desired | None) -> None:
            if now is None:
                self._take(events.Declared(None))
            elif self._declared and now.revision:
                self._take(events.Declared(now))
            else:
                self._world.calls.desire(Desired(now.revision, self.fleet.slots), said)

        def said(made: Desired | None) -> None:
            self._declared |= made is not None
            self._take(events.Declared(made))

        self._world.calls.desired(found)

    def _ask_drain(self, name: str, generation: int | None) -> None:
        life = self.lives[name]

        def taken(status: int, body: bytes) -> None:
            if name in self.fleet.children:
                told = status in (200, 404, 409)
                self._take(events.DrainAnswer(name, told, life.load))

        if generation is None:
            taken(404, b"")
        else:
            body = control.encode(control.Drain(generation))
            self._world.calls.ask(Request("drain", name, body, generation), taken)


class World:
    """One fleet under one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.outcome = Outcome(seed)
        self.clockwork = Clockwork()
        self.network = Network(self.clockwork, self.rng)
        self.controller = SimController(self.clockwork, seed)
        self.controller.start()
        self.calls = Calls(self.clockwork, self.network, self.controller)
        self.routers_view = SimWatcher(self.clockwork, self.controller, self.rng)
        self.supervisors_view = SimWatcher(self.clockwork, self.controller, self.rng)
        self._born = 0
        self.supervisor = Supervisor(self)
        self._route()

    def run(self) -> Outcome:
        """Faults and orders for a while, then healing, then the fleet is judged."""
        try:
            self.network.faults = Faults(
                self.rng.choice((0.0, 0.05, 0.2)), self.rng.choice((0, 0.1)), self.rng.choice((0.02, 0.3))
            )
            breaks = self.rng.choice((0.0, 0.05))
            self.routers_view.break_chance = self.supervisors_view.break_chance = breaks
            self.clockwork.at(8.0, self._fault)
            self.clockwork.at(6.0, self._order)
            self.clockwork.run_until(FAULTS_S, lambda: None)
            self._heal()
            self.clockwork.run_until(FAULTS_S + HEAL_S, lambda: None)
            self._judge()
        except AssertionError as error:
            self.outcome.broken = str(error) or "an assertion"
        return self.outcome

    def born(self, name: str) -> Instance:
        self._born += 1
        return Instance(self.clockwork, self.network, self.controller, name, self._born)

    def router_is_behind(self, life: Instance) -> bool:
        """Whether the router has not heard yet that this life drains: it may send there."""
        seen = self.routers_view.members.get(life.name)
        return seen is not None and seen.incarnation == life.incarnation and seen.state == "ready"

    # Requests and orders ----------------------------------------------------------------------------------------------

    def _route(self) -> None:
        """The router sends a request to a member that it holds for ready."""
        serving = [member for member in self.routers_view.members.values() if member.state == "ready"]
        if serving:
            member = self.rng.choice(sorted(serving, key=lambda one: one.name))
            life = self.supervisor.lives.get(member.name)
            if life is not None and life.incarnation == member.incarnation and life.alive:
                self._ask(life)
        self.clockwork.at(self.rng.uniform(0.02, 0.2), self._route)

    def _ask(self, life: Instance) -> None:
        life.requests += 1
        self.outcome.counts["requests"] += 1
        took_s = self.rng.uniform(0.05, 3.0)
        leaves = self.rng.random() < 0.2

        def answered() -> None:
            life.requests -= 1
            if leaves:
                life.held += 1
                self.clockwork.at(self.rng.uniform(0.01, 5.0), taken)

        def taken() -> None:
            life.held -= 1

        self.clockwork.at(took_s, answered)

    def _order(self) -> None:
        if self.clockwork.now >= FAULTS_S:
            return
        self.calls.desired(self._ordered)
        self.clockwork.at(self.rng.uniform(1.0, 12.0), self._order)

    def _ordered(self, now: Desired | None) -> None:
        if now is None or not now.revision:
            return
        slots, rng = now.instances, self.rng
        name = rng.choice(slots).name
        edits: tuple[tuple[str, Callable[[], desired.Slots]], ...] = (
            ("scale", lambda: desired.scaled(slots, {rng.choice(ROLES): rng.randrange(4)}, self.supervisor.lives)),
            ("role", lambda: desired.with_role(slots, name, rng.choice(ROLES))),
            ("drain", lambda: desired.without(slots, name)),
            ("restart", lambda: desired.restarted(slots, [name], rolling=False)),
            ("rolling", lambda: desired.restarted(slots, [], rolling=True, busy=self.supervisor.lives)),
        )
        kind, edit = rng.choice(edits)
        try:
            made = edit()
        except BadRequest:
            return
        if len(made) <= 8:
            self.outcome.counts[kind] += 1
            self.calls.desire(Desired(now.revision, made), lambda _: None)

    # Faults -----------------------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        if self.clockwork.now >= FAULTS_S - 1:
            return
        fault = self.rng.choice((self._kill, self._kill, self._pause, self._crash, self._partition, self._full))
        self.outcome.counts[fault.__name__.strip("_")] += 1
        fault()
        self.clockwork.at(self.rng.uniform(1.0, 10.0), self._fault)

    def _kill(self) -> None:
        self.rng.choice(sorted(self.supervisor.lives.values(), key=lambda life: life.name)).alive = False

    def _pause(self) -> None:
        life = self.rng.choice(sorted(self.supervisor.lives.values(), key=lambda one: one.name))
        life.paused_until = self.clockwork.now + self.rng.choice((1.0, 4.0, 12.0))

    def _crash(self) -> None:
        self.controller.crash()
        self.clockwork.at(self.rng.uniform(0.1, 5.0), self.controller.start)

    def _full(self) -> None:
        self.controller.disk.full = True
        self.clockwork.at(self.rng.uniform(0.5, 6.0), self._free_disk)

    def _free_disk(self) -> None:
        self.controller.disk.full = False

    def _partition(self) -> None:
        bad, self.network.faults = self.network.faults, Faults(loss=1.0)

        def heal() -> None:
            self.network.faults = bad if self.clockwork.now < FAULTS_S else Faults()

        self.clockwork.at(self.rng.uniform(0.5, 5.0), heal)

    def _heal(self) -> None:
        self.network.faults = Faults()
        self.controller.disk.full = False
        self.controller.start()
        self.routers_view.break_chance = self.supervisors_view.break_chance = 0.0

    # Promises ---------------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        state, fleet = self.controller.state, self.supervisor.fleet
        assert state is not None, "the controller is down"
        assert fleet.slots == state.desired.instances, "the supervisor wants another fleet than the controller knows"
        wanted = {slot.name: slot for slot in fleet.slots}
        states = {child.name: child.state for child in fleet.instances()}
        assert states == dict.fromkeys(wanted, "ready"), f"to be: {sorted(wanted)}, is: {states}"
        roles = {name: (member.role, member.state) for name, member in state.members.items()}
        assert roles == {name: (slot.role, "ready") for name, slot in wanted.items()}, f"members: {roles}"
        for child in fleet.instances():
            slot = wanted[child.name]
            alone = child.note.startswith("waits with its restart") and not desired.has_stand_in(fleet.slots, slot)
            assert child.ordered >= slot.restarts or alone, f"{child.name} was never restarted"
            assert not child.note or alone, child.note
            assert self.supervisor.lives[child.name].incarnation == state.members[child.name].incarnation
        alive = sum(life.alive for life in self.supervisor.lives.values())
        assert alive == len(wanted), f"{alive} processes for {len(wanted)} instances"


def run_seed(seed: int) -> Outcome:
    """One simulated fleet from beginning to end."""
    return World(seed).run()
