"""Each in turn."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.contract import Loads, Policy
from vllm_fleet.router.policies.facts import Facts


class RoundRobin(Policy):
    """The next name after the last one used, in the order of names: fair when members come and go, unlike an index."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last = InstanceName("")

    def choose(self, names: Sequence[InstanceName], loads: Loads, facts: Facts) -> InstanceName | None:
        if not names:
            return None
        at = bisect(names, self._last)
        return names[at if at < len(names) else 0]

    def sent(self, name: InstanceName, facts: Facts) -> None:
        self._last = name
