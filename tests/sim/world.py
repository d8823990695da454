"""One simulated fleet: faults for a while, then healing, then everybody must agree. One seed decides all of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.sim.clockwork import Clockwork, Faults, Network
from tests.sim.controller_sim import RULES, SimController
from tests.sim.members import SimLife, SimWatcher

FAULTS_S = 60.0
HEAL_S = 3 * RULES.lease_s
REST_S = RULES.lease_s
NAMES = ("prefill-0", "decode-0", "decode-1", "both-0")
RATES = (0.5, 1.0, 2.0)  # how fast clocks go


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
    """The fleet under one seed. ``only``: the kinds of trouble that there are; None: all. With ``only`` the network is
    good when nothing else is said.
    """

    def __init__(self, seed: int, only: Sequence[str] | None = None) -> None:
        self._only = only
        self._copies = [b""]
        self._healed = False
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
            if self._only is None:
                self.network.faults = Faults(
                    self.rng.choice((0.0, 0.01, 0.1, 0.3)),
                    self.rng.choice((0, 0.05, 0.3)),
                    self.rng.choice((0.02, 0.5, 2)),
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

    def run_and_heal(self, within_s: float) -> Outcome:
        """Live through faults and heal: ``within_s`` after, everybody must agree."""
        try:
            self._next_fault()
            self.clockwork.run_until(FAULTS_S, self._check_revision)
            self._heal()
            self.clockwork.run_until(FAULTS_S + within_s, self._check_revision)
            self._judge()
        except AssertionError as error:
            self.outcome.broken = str(error) or "an assertion of the controller"
        self._count()
        return self.outcome

    # Faults --------------------------------------------------------------------------------------------------------

    def _next_fault(self) -> None:
        if self.clockwork.now >= FAULTS_S - 1:
            return
        faults = (
            self._kill, self._kill, self._pause, self._zombie, self._leave, self._rename, self._crash, self._torn_crash,
            self._pause_controller, self._pause_all, self._fill_disk, self._old_journal, self._no_journal,
            self._step_clock, self._step_members_clock, self._drift, self._partition, self._one_way, self._mute,
            self._deaf, self._double_all,
        )  # fmt: skip
        named = [(fault.__name__.strip("_"), fault) for fault in faults]
        name, fault = self.rng.choice([one for one in named if self._only is None or one[0] in self._only])
        self.outcome.faults[name] += 1
        fault()
        if self.rng.random() < 0.3:
            self._copies.append(self.controller.disk.journal)
        self.clockwork.at(self.rng.uniform(0.2, 4.0), self._next_fault)

    def _born(self, name: str) -> None:
        life = SimLife(self.clockwork, self.network, self.controller, name, len(self.lives) + 1)
        if self._only is None:
            life.clock_rate = self.rng.choice(RATES)
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

    def _pause_all(self) -> None:
        """The whole machine stands still; its clocks go on."""
        until = self.clockwork.now + self.rng.choice((1.0, 5.0, 20.0))
        self.controller.paused_until = until
        for life in self.lives:
            life.paused_until = max(life.paused_until, until)

    def _old_journal(self) -> None:
        """Somebody puts an older copy of the journal back."""
        self.controller.crash()
        self.controller.disk.journal = self.rng.choice(self._copies)
        self.clockwork.at(self.rng.uniform(0.1, 5.0), self.controller.start)

    def _no_journal(self) -> None:
        self.controller.crash()
        self.controller.disk.journal = b""
        self.clockwork.at(self.rng.uniform(0.1, 5.0), self.controller.start)

    def _fill_disk(self) -> None:
        self.controller.disk.full = True
        self.clockwork.at(self.rng.uniform(0.5, 6.0), self._free_disk)

    def _free_disk(self) -> None:
        self.controller.disk.full = False

    def _step_clock(self) -> None:
        self.controller.env.step(self.rng.choice((-500.0, -1.0, 0.5, 5.0, 3600.0)))

    def _step_members_clock(self) -> None:
        self._victim().step_clock(self.rng.choice((-3.0, -1.0, 0.5, 3600.0)))

    def _drift(self) -> None:
        """Clocks go at different speeds from here on."""
        self.controller.env.run_at(self.rng.choice(RATES))
        self._victim().clock_rate = self.rng.choice(RATES)

    def _partition(self) -> None:
        """Nobody reaches the controller, and it reaches nobody."""
        self._network_trouble(self.rng.choice((0.5, 5.0, 12.0)), "up", "down")

    def _one_way(self) -> None:
        """Nobody reaches the controller, or it reaches nobody: requests, or only their answers, are lost."""
        self._network_trouble(self.rng.choice((0.5, 5.0, 12.0)), self.rng.choice(("up", "down")))

    def _double_all(self) -> None:
        self._network_trouble(self.rng.uniform(0.5, 5.0), "double")

    def _network_trouble(self, seconds: float, *kinds: str) -> None:
        self.network.troubles.update(kinds)
        if "down" in kinds:
            for watcher in self.watchers:
                watcher.deaf_until = max(watcher.deaf_until, self.clockwork.now + seconds)
        self.clockwork.at(seconds, lambda: self._end_trouble(kinds))

    def _end_trouble(self, kinds: Sequence[str]) -> None:
        if not self._healed:
            self.network.troubles.subtract(kinds)

    def _mute(self) -> None:
        """One member's messages do not reach the controller; it hears what it is told."""
        self._victim().mute_until = self.clockwork.now + self.rng.choice((0.5, 3.0, 12.0))

    def _deaf(self) -> None:
        """One member's messages arrive, their answers do not."""
        self._victim().deaf_until = self.clockwork.now + self.rng.choice((0.5, 3.0, 12.0))

    # Promises ------------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        self.network.faults = Faults()
        self.network.troubles.clear()
        self._healed = True
        self.controller.paused_until = 0.0
        self.controller.env.run_at(1.0)
        self.controller.disk.full = False
        self.controller.disk.crash_after_bytes = None
        self.controller.start()
        for life in self.lives:
            life.paused_until = min(life.paused_until, self.clockwork.now)
            life.mute_until = life.deaf_until = 0.0
            life.clock_rate = 1.0
        for watcher in self.watchers:
            watcher.deaf_until = 0.0
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
            held = living[member.incarnation].generation
            assert held == member.generation, f"{name} takes itself for generation {held}, not {member.generation}"
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


def run_seed(seed: int, only: Sequence[str] | None = None) -> Outcome:
    """One simulated fleet from beginning to end."""
    return World(seed, only).run()
