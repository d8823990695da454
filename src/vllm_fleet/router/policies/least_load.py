"""Least busy first; those who are equally busy take turns."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.contract import Loads, Policy
from vllm_fleet.router.policies.facts import Facts


class LeastLoad(Policy):
    """The least load of all; ties go round robin in the order of names. Looks at each: for tens of instances."""

    name = "least_load"

    def __init__(self) -> None:
        self._last = ""

    def choose(self, names: Sequence[InstanceName], loads: Loads, facts: Facts) -> InstanceName | None:
        if len(names) < 2:
            return names[0] if names else None
        last, ask, least = self._last, loads.load, float("inf")
        first = later = None
        for name in names:
            load = ask(name)
            if load < least:
                least, first = load, name
                later = name if name > last else None
            elif later is None and load == least and name > last:
                later = name
        return later or first

    def sent(self, name: InstanceName, facts: Facts) -> None:
        self._last = name
