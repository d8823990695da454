"""The less busy of two drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.contract import Loads, Policy
from vllm_fleet.router.policies.facts import Facts


class PowerOfTwo(Policy):
    """Costs the same for two instances and for a thousand, and several routers that know little of one another do not
    all run to the one that looked idle."""

    name = "power_of_two"

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random

    def choose(self, names: Sequence[InstanceName], loads: Loads, facts: Facts) -> InstanceName | None:
        count = len(names)
        if count < 2:
            return names[0] if names else None
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        if second >= first:
            second += 1
        one, other = names[first], names[second]
        return other if loads.load(other) < loads.load(one) else one
