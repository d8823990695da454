"""One simulated fleet: faults for a while, then healing, then everybody must agree. One seed decides all of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from tests.sim.clockwork import Clockwork, Faults, Network
from tests.sim.controller_sim import RULES, SimController
from tests.sim.members import SimLife, SimWatcher

FAULTS_S = 60.0
HEAL_S = 3 * RULES.lease_s
REST_S = RULES.lease_s
NAMES = ("prefill-0", "decode-0", "decode-1", "both-0")


@dataclass
class Outcome:
    """What happened under one seed; ``broken`` says which promise did not hold."""

    seed: int
    broken: str = ""
    faults: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for people."""
        done = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())) or "none"
        seen = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        verdict = f"BROKEN: {self.broken}" if self.broken else "all promises held"
        return f"seed {self.seed}: {verdict}\n  faults: {done}\n  seen: {seen}"


class World:
    """The fleet under one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clockwork = Clockwork()
        self.network = Network(self.clockwork, self.rng)
        self.controller = SimController(self.clockwork, seed)
        self.controller.start()
        self.lives: list[SimLife] = []
        self.current: dict[str, SimLife] = {}
        self.watchers = [SimWatcher(self.clockwork, self.controller, self.rng) for _ in range(2)]
        self.outcome = Outcome(seed)
        for name in NAMES:
            self._born(name)

    def run(self) -> Outcome:
        """Live through faults, heal, and judge."""
        try:
            self.network.faults = Faults(
                self.rng.choice((0.0, 0.01, 0.1, 0.3)), self.rng.choice((0, 0.05, 0.3)), self.rng.choice((0.02, 0.5, 2))
            )
            for watcher in self.watchers:
                watcher.break_chance = 0.05
            self._next_fault()
            self.clockwork.run_until(FAULTS_S, self._check_revision)
            self._heal()
            self.clockwork.run_until(FAULTS_S + HEAL_S, self._check_revision)
            settled = self._revision()
            self.clockwork.run_until(FAULTS_S + HEAL_S + REST_S, self._check_revision)
            assert self._revision() == settled, "the fleet does not come to rest after its faults healed"
            self._judge()
        except AssertionError as error:
            self.outcome.broken = str(error) or "an assertion of the controller"
        self._count()
        return self.outcome

    # Faults --------------------------------------------------------------------------------------------------------

    def _next_fault(self) -> None:
        if self.clockwork.now >= FAULTS_S - 1:
            return
        fault = self.rng.choice(
            (self._kill, self._kill, self._pause, self._zombie, self._leave, self._crash, self._torn_crash,
             self._pause_controller, self._fill_disk, self._step_clock, self._partition, self._rename)
        )  # fmt: skip
        self.outcome.faults[fault.__name__.strip("_")] += 1
        fault()
        self.clockwork.at(self.rng.uniform(0.2, 4.0), self._next_fault)

    def _born(self, name: str) -> None:
        life = SimLife(self.clockwork, self.network, self.controller, name, len(self.lives) + 1)
        self.lives.append(life)
        self.current[name] = life

    def _victim(self) -> SimLife:
        return self.current[self.rng.choice(NAMES)]

    def _reborn_later(self, name: str) -> None:
        self.clockwork.at(self.rng.uniform(0.1, 3.0), lambda: None if self.current[name].alive else self._born(name))

    def _kill(self) -> None:
        life = self._victim()
        life.alive = False
        self._reborn_later(life.name)

    def _leave(self) -> None:
        life = self._victim()
        if life.alive and not life.paused:
            life.leave()
        self._reborn_later(life.name)

    def _pause(self) -> None:
        self._victim().paused_until = self.clockwork.now + self.rng.choice((0.5, 2.0, 12.0))

    def _zombie(self) -> None:
        """A life is paused and replaced; then it goes on as if nothing had happened."""
        life = self._victim()
        life.paused_until = self.clockwork.now + self.rng.uniform(1.0, 15.0)
        self._born(life.name)

    def _rename(self) -> None:
        """Another name turns up at the address of a life that died."""
        life = self._victim()
        life.alive = False
        self._born(life.name)
        self.current[life.name].url = self.rng.choice(self.lives).url

    def _crash(self) -> None:
        self.controller.crash()
        self.clockwork.at(self.rng.uniform(0.1, 5.0), self.controller.start)

    def _torn_crash(self) -> None:
        """The next change is written in part (or whole), then the controller dies."""
        self.controller.disk.crash_after_bytes = self.rng.choice((0, 1, 7, 8, 20, 100, 10_000))
        self.clockwork.at(self.rng.uniform(3.0, 8.0), self.controller.start)

    def _pause_controller(self) -> None:
        self.controller.paused_until = self.clockwork.now + self.rng.choice((0.3, 1.0, 3.0, 15.0))

    def _fill_disk(self) -> None:
        self.controller.disk.full = True
        self.clockwork.at(self.rng.uniform(0.5, 6.0), self._free_disk)

    def _free_disk(self) -> None:
        self.controller.disk.full = False

    def _step_clock(self) -> None:
        self.controller.env.skew_s += self.rng.choice((-500.0, -1.0, 0.5, 5.0, 3600.0))

    def _partition(self) -> None:
        bad, self.network.faults = self.network.faults, Faults(loss=1.0)

        def heal() -> None:
            self.network.faults = bad if self.clockwork.now < FAULTS_S else Faults()

        self.clockwork.at(self.rng.uniform(0.5, 5.0), heal)

    # Promises ------------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        self.network.faults = Faults()
        self.controller.paused_until = 0.0
        self.controller.disk.full = False
        self.controller.disk.crash_after_bytes = None
        self.controller.start()
        for life in self.lives:
            life.paused_until = min(life.paused_until, self.clockwork.now)
        for watcher in self.watchers:
            watcher.break_chance = 0.0

    def _check_revision(self) -> None:
        state = self.controller.state
        if state is not None and state.history:
            assert state.history[-1].revision == state.revision, "the history does not end at the revision"

    def _revision(self) -> int:
        return -1 if self.controller.state is None else self.controller.state.revision

    def _judge(self) -> None:
        state = self.controller.state
        assert state is not None, "the controller is down"
        assert state.durable, "the controller did not save again after the disk came back"
        urls = [member.url for member in state.members.values()]
        assert len(urls) == len(set(urls)), "two members have one address"
        living = {life.incarnation: life for life in self.lives if life.alive}
        for name, member in state.members.items():
            assert member.incarnation in living, f"{name} is dead but still a member"
            assert member.state == "ready", f"{name} lives but is {member.state}"
        for life in living.values():
            taken = any(member.url == life.url and member.name != life.name for member in state.members.values())
            assert taken or life.name in state.members, f"{life.name} lives but is no member"
        for watcher in self.watchers:
            assert watcher.controller == state.controller, "a watcher follows another history"
            assert watcher.revision == state.revision, f"a watcher is at {watcher.revision}, not {state.revision}"
            assert watcher.members == state.members, "a watcher sees another fleet"

    def _count(self) -> None:
        self.outcome.counts = {
            "turns": self.controller.turns,
            "messages": self.network.sent,
            "lost": self.network.lost,
            "doubled": self.network.doubled,
            "lives": len(self.lives),
            "controller starts": self.controller.starts,
            "generations": sum(map(len, self.controller.granted.values())),
            "changes seen": sum(watcher.changes for watcher in self.watchers),
            "snapshots seen": sum(watcher.snapshots for watcher in self.watchers),
        }


def run_seed(seed: int) -> Outcome:
    """One simulated fleet from beginning to end."""
    return World(seed).run()
