"""Simulated time and a simulated network, driven by one random source."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Action = Callable[[], None]
LATE_S_MAX = 15.0  # no message is later: after healing, the last ghosts of dead members come within this time


class Clockwork:
    """Runs actions in the order of their times; the simulation's only source of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._count = 0
        self._waiting: list[tuple[float, int, Action]] = []

    def at(self, delay_s: float, action: Action) -> None:
        """Run ``action`` in ``delay_s`` seconds."""
        self.at_time(self.now + delay_s, action)

    def at_time(self, when: float, action: Action) -> None:
        """Run ``action`` at ``when``, after all others of that time."""
        self._count += 1
        heapq.heappush(self._waiting, (when, self._count, action))

    def run_until(self, end: float, after_each: Action) -> None:
        """Run everything up to ``end``, and ``after_each`` after each action."""
        while self._waiting and self._waiting[0][0] <= end:
            self.now, _, action = heapq.heappop(self._waiting)
            action()
            after_each()
        self.now = end


@dataclass
class Faults:
    """How bad the network is."""

    loss: float = 0.0
    duplicates: float = 0.0
    delay_s_max: float = 0.01


Way = Literal["up", "down"]
"""A message to the controller, or from it."""


class Network:
    """Carries encoded messages: some are lost, some come twice, some late and so out of order. ``troubles`` counts what
    holds for a while: every message of one way lost ("up", "down"), or every message doubled ("double").
    """

    def __init__(self, clockwork: Clockwork, rng: random.Random) -> None:
        self._clockwork, self._rng = clockwork, rng
        self.faults = Faults()
        self.troubles: Counter[str] = Counter()
        self.sent = self.lost = self.doubled = 0

    def send(self, deliver: Action, way: Way | None = None) -> None:
        """Deliver one message, or not."""
        self.sent += 1
        if self._rng.random() < self.faults.loss or (way is not None and self.troubles[way]):
            self.lost += 1
            return
        self._clockwork.at(self.delay_s(), deliver)
        if self._rng.random() < self.faults.duplicates or self.troubles["double"]:
            self.doubled += 1
            self._clockwork.at(min(5 * self.delay_s(), LATE_S_MAX), deliver)

    def delay_s(self) -> float:
        """How long the next message travels; a few are very late."""
        late = 20 if self._rng.random() < 0.02 else 1
        return min(self._rng.uniform(0.001, self.faults.delay_s_max) * late, LATE_S_MAX)
