"""Each message to the controller lost, answered with the answer lost, or doubled: the end is the same as without."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Literal

import pytest

from tests.sim.clockwork import Clockwork, Network
from tests.sim.controller_sim import Request, SimController
from tests.sim.members import SimLife, SimWatcher
from vllm_fleet.wire import control
from vllm_fleet.wire.control import Desired, Drain, Slot

How = Literal["request lost", "answer lost", "doubled", "doubled late"]
METHODS = {"register": 2, "heartbeat": 6, "drain": 1, "desire": 1, "deregister": 1}
"""Kinds of messages, and how many of each at least the script below sends."""

LATE_S = 3.0
ANSWER_S = 1.0
WISH = Desired(0, (Slot("stays", "prefill"), Slot("leaves", "decode")))


class Troubled(SimController):
    """Something happens to the ``number``-th message of one kind."""

    def __init__(self, clockwork: Clockwork, method: str, number: int, how: How | None) -> None:
        super().__init__(clockwork, seed=1)
        self.seen: Counter[str] = Counter()
        self.happened = False
        self._method, self._number, self._how = method, number, how

    def receive(self, request: Request, answer: Callable[[int, bytes], None]) -> None:
        self.seen[request.method] += 1
        if request.method != self._method or self.seen[request.method] != self._number or self._how is None:
            super().receive(request, answer)
            return
        self.happened = True
        if self._how == "request lost":
            return
        answered = answer if self._how != "answer lost" else _lost
        super().receive(request, answered)
        if self._how == "doubled":
            super().receive(request, answer)
        elif self._how == "doubled late":
            self._clockwork.at(LATE_S, lambda: SimController.receive(self, request, answer))


def _lost(status: int, body: bytes) -> None:
    pass


class Asker:
    """Asks for what the launcher asks for, again and again until it is answered."""

    def __init__(self, clockwork: Clockwork, controller: SimController) -> None:
        self._clockwork, self._controller = clockwork, controller

    def ask(self, request: Request) -> None:
        answered = False

        def answer(status: int, body: bytes) -> None:
            nonlocal answered
            assert status == 200, (request, status, body)
            answered = True

        self._controller.receive(request, answer)
        self._clockwork.at(ANSWER_S, lambda: None if answered else self.ask(request))


def play(method: str, number: int, how: How | None) -> tuple[object, Troubled]:
    """Two members join, the fleet is described, one is drained and leaves, and the fleet comes to rest."""
    clockwork = Clockwork()
    network = Network(clockwork, random.Random(1))
    controller = Troubled(clockwork, method, number, how)
    controller.start()
    watcher = SimWatcher(clockwork, controller, random.Random(2))
    stays = SimLife(clockwork, network, controller, "stays", 1)
    leaves = SimLife(clockwork, network, controller, "leaves", 2)
    asker = Asker(clockwork, controller)

    def drain() -> None:
        assert leaves.generation is not None
        asker.ask(Request("drain", "leaves", control.encode(Drain(leaves.generation)), leaves.generation))

    clockwork.at(6.0, lambda: asker.ask(Request("desire", "", control.encode(WISH))))
    clockwork.at(9.0, drain)
    clockwork.at(12.0, leaves.leave)
    clockwork.run_until(40.0, lambda: None)
    state = controller.state
    assert state is not None
    assert watcher.members == state.members, "the watcher sees another fleet"
    assert stays.generation == state.members["stays"].generation
    found = [(m.name, m.incarnation, m.role, m.state) for m in state.members.values()]
    return (
        found,
        state.desired.instances,
        len(controller.granted["stays"]),
        len(controller.granted["leaves"]),
    ), controller


@pytest.mark.parametrize("how", ["request lost", "answer lost", "doubled", "doubled late"])
@pytest.mark.parametrize("method", METHODS)
def test_the_end_is_the_same_as_without(method: str, how: How) -> None:
    once, calm = play(method, 0, None)
    assert once == ([("stays", "stays-life-1", "prefill", "ready")], WISH.instances, 1, 1)
    assert calm.seen[method] >= METHODS[method]
    for number in range(1, METHODS[method] + 1):
        found, controller = play(method, number, how)
        assert controller.happened
        assert found == once, f"message {number}"
