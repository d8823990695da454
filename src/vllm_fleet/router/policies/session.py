"""All requests of one session to one instance, by consistent hashing with bounded load."""

from __future__ import annotations

import math
from bisect import bisect
from collections import OrderedDict
from collections.abc import Sequence

import xxhash

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.contract import Loads, Policy
from vllm_fleet.router.policies.facts import Facts
from vllm_fleet.router.policies.least_load import LeastLoad

_POINTS = 128  # of one instance on the ring: shares differ by about 1/sqrt of it
_RINGS_MAX = 16  # sets of names whose ring is kept


class Session(Policy):
    """The first instance after the session's point on a ring that is not too busy.

    When an instance joins or leaves, only sessions that come to it or were at it move. Too busy is one with more than
    ``bound`` times the mean load: its sessions go to their next on the ring meanwhile, so that a few loud ones cannot
    drown it. Requests without a session go to the least busy.
    """

    name = "session"

    def __init__(self, header: str, bound: float) -> None:
        self._header, self._bound = header, bound
        self._rings: OrderedDict[tuple[InstanceName, ...], tuple[list[int], list[InstanceName]]] = OrderedDict()
        self._others = LeastLoad()

    def choose(self, names: Sequence[InstanceName], loads: Loads, facts: Facts) -> InstanceName | None:
        key = facts.session(self._header)
        if key is None or len(names) < 2:
            return self._others.choose(names, loads, facts)
        points, owners = self._ring(tuple(names))
        known = {name: loads.load(name) for name in names}
        most = math.ceil(self._bound * (sum(known.values()) + 1) / len(known))
        start = bisect(points, _point(key))
        seen: set[InstanceName] = set()
        for step in range(len(owners)):
            name = owners[(start + step) % len(owners)]
            if known[name] + 1 <= most:
                return name
            seen.add(name)
            if len(seen) == len(known):
                break
        return min(known, key=known.__getitem__)

    def sent(self, name: InstanceName, facts: Facts) -> None:
        self._others.sent(name, facts)

    def _ring(self, names: tuple[InstanceName, ...]) -> tuple[list[int], list[InstanceName]]:
        ring = self._rings.get(names)
        if ring is None:
            placed = sorted((_point(f"{name} {number}"), name) for name in names for number in range(_POINTS))
            ring = self._rings[names] = ([point for point, _ in placed], [name for _, name in placed])
            if len(self._rings) > _RINGS_MAX:
                self._rings.popitem(last=False)
        return ring


def _point(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))
