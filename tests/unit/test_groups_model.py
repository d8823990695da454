"""Groups under faults: every single fault at every step for 2 to 4 members, every pair of faults for 2, random ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.unit.groups_world import TICK_S, Loss, World, rounds

Fault = tuple[str, Callable[[World], None]]
LOSSES: tuple[Loss, ...] = ("request", "reply", "twice")


def lose(loss: Loss) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.loss = loss

    return act


def comes_back(world: World, name: str) -> None:
    world.kill(name)
    world.born(name)


def outage(world: World, seconds: float) -> None:
    world.down = True
    world.wait(seconds)
    world.down = False
    world.restart()


def stuck_for(world: World, name: str, seconds: float) -> None:
    world.get_stuck(name)
    world.wait(seconds)


def faults(names: str) -> Iterator[Fault]:
    """Everything that may happen once."""
    for loss in LOSSES:
        yield f"lost {loss}", lose(loss)
    yield "controller restarts", World.restart
    yield "controller is away", lambda world: outage(world, 6.0)
    for name in names:
        yield f"{name} dies", lambda world, name=name: world.kill(name)  # type: ignore[misc]
        yield f"{name}'s host dies", lambda world, name=name: world.kill(name, silently=True)  # type: ignore[misc]
        yield f"{name} is replaced", lambda world, name=name: comes_back(world, name)  # type: ignore[misc]
        yield f"{name} is replaced at once", lambda world, name=name: world.born(name)  # type: ignore[misc]
        yield f"{name} fails", lambda world, name=name: world.fails(name)  # type: ignore[misc]
        yield f"{name} is stuck", lambda world, name=name: stuck_for(world, name, 6.0)  # type: ignore[misc]
        other = names[(names.index(name) + 1) % len(names)]
        yield f"{name} blames {other}", lambda world, n=name, o=other: world.fails(n, (o,))  # type: ignore[misc]
    for number in (0, 3, 8):
        yield f"copy {number} arrives", lambda world, number=number: world.again(number)  # type: ignore[misc]


def started(names: str, order: str, least: int = 2) -> World:
    world = World(names, least=least, order=order)
    for name in names:
        world.born(name)
    return world


def length(names: str, order: str) -> int:
    """Steps until everybody is in, and a few more."""
    world = started(names, order)
    for number, step in enumerate(rounds(world)):
        step()
        if all(member.formed for member in world.members.values()):
            return number + 2 * len(names) + 2
    raise AssertionError("a run without faults does not form a group")


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
@pytest.mark.parametrize("backwards", [False, True])
def test_every_fault_at_every_step(names: str, backwards: bool) -> None:
    order = names[::-1] if backwards else names
    for at in range(length(names, order)):
        for what, act in faults(names):
            world = started(names, order)
            for step in itertools.islice(rounds(world), at):
                step()
            act(world)
            try:
                world.settle()
            except AssertionError as error:
                raise AssertionError(f"{what} at step {at} of {names}, in order {order}: {error}") from error


STRIDE = 8
"""One pair of faults in so many is tried; 1 tries all (17 s)."""


def test_pairs_of_faults() -> None:
    for first, second in itertools.combinations_with_replacement(range(length("ab", "ab")), 2):
        for (what, act), (then, act_then) in itertools.product(faults("ab"), repeat=2):
            if (first + 5 * second + hash_of(what) + 3 * hash_of(then)) % STRIDE:
                continue
            world = started("ab", "ab")
            steps = rounds(world)
            for step in itertools.islice(steps, first):
                step()
            act(world)
            for step in itertools.islice(steps, second - first):
                step()
            act_then(world)
            try:
                world.settle()
            except AssertionError as error:
                raise AssertionError(f"{what} at {first}, {then} at {second}: {error}") from error


def hash_of(text: str) -> int:
    return sum(text.encode())


class Groups(RuleBasedStateMachine):
    """Random faults on a group of four of whom two are enough."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World("abcd")
        for name in "abc":
            self.world.born(name)

    @rule(name=st.sampled_from("abcd"))
    def step(self, name: str) -> None:
        self.world.step(name)

    @rule(ticks=st.integers(1, 16))
    def time(self, ticks: int) -> None:
        self.world.wait(ticks * TICK_S)

    @rule(name=st.sampled_from("abcd"), silently=st.booleans())
    def kill(self, name: str, silently: bool) -> None:
        if name in self.world.members:
            self.world.kill(name, silently)

    @rule(name=st.sampled_from("abcd"))
    def born(self, name: str) -> None:
        self.world.born(name)

    @rule(name=st.sampled_from("abcd"), blamed=st.lists(st.sampled_from("abcd"), max_size=2))
    def fail(self, name: str, blamed: list[str]) -> None:
        if name in self.world.members and self.world.members[name].stage != "gone":
            self.world.fails(name, tuple(blamed))

    @rule(name=st.sampled_from("abcd"))
    def stuck(self, name: str) -> None:
        if name in self.world.members:
            self.world.get_stuck(name)

    @rule(loss=st.sampled_from(LOSSES))
    def lose(self, loss: Loss) -> None:
        self.world.loss = loss

    @rule(number=st.integers(0, 39))
    def again(self, number: int) -> None:
        self.world.again(number)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @precondition(lambda self: not self.world.down)
    @rule()
    def goes_away(self) -> None:
        self.world.down = True

    @precondition(lambda self: self.world.down)
    @rule(knowing=st.booleans())
    def returns(self, knowing: bool) -> None:
        self.world.down = False
        if not knowing:
            self.world.restart()

    def teardown(self) -> None:
        self.world.settle()


TestGroups = Groups.TestCase
TestGroups.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
